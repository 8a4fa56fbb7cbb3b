"""Copies whole blocks of the paged key-value cache, for sequences that must no longer share one (copy-on-write).

A step may give back a block and hand it out again as the target of another copy, so the pairs of one call count as
simultaneous: every source is read as it was before the call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check, check_ids
from minivllm.ops._register import define
from minivllm.ops.store_kv import check_cache


def _check_copy(k_cache: Tensor, v_cache: Tensor, sources: Tensor, targets: Tensor) -> Check:
    check = Check("copy_blocks", k_cache.device)
    check.tensor("k_cache", k_cache, "num_blocks num_kv_heads block_size head_dim", FLOATS)
    check_cache(check, "k_cache", k_cache, k_cache.dtype)
    check_cache(check, "v_cache", v_cache, k_cache.dtype)
    check.tensor("sources", sources, "n", (torch.int64,))
    check.tensor("targets", targets, "n", (torch.int64,))
    return check


def copy_blocks_reference(k_cache: Tensor, v_cache: Tensor, sources: Tensor, targets: Tensor) -> None:
    """The op's meaning in plain PyTorch; it never waits for the device."""
    check = _check_copy(k_cache, v_cache, sources, targets)
    check_ids(check, "sources", sources, k_cache.shape[0])
    check_ids(check, "targets", targets, k_cache.shape[0])
    for cache in (k_cache, v_cache):
        cache[targets] = cache[sources]


def _copy_fake(k_cache: Tensor, v_cache: Tensor, sources: Tensor, targets: Tensor) -> None:
    _check_copy(k_cache, v_cache, sources, targets)


_copy_blocks = define(
    "copy_blocks",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor sources, Tensor targets) -> ()",
    copy_blocks_reference,
    _copy_fake,
)


def copy_blocks(k_cache: Tensor, v_cache: Tensor, sources: Tensor, targets: Tensor) -> None:
    """In both caches block targets[i] becomes a copy of what block sources[i] was before the call.

    Args:
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim] float32, bfloat16 or float16, written; layout as in
            `store_kv`.
        v_cache: like k_cache, written; it must not overlap k_cache.
        sources: [n] int64 block ids; a block may be the source of several copies, and a target too.
        targets: [n] int64 block ids, all different: of two copies to one block, either may win, element by element.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides; on the CPU also an id outside [0, num_blocks), before
            anything is written (on CUDA such an id is undefined behaviour, because to look at it would stall the GPU).
    """
    _copy_blocks(k_cache, v_cache, sources, targets)
