"""Copies blocks of the key-value cache between two caches: to host memory when the device is full, and back.

The block ids lie on the device, where the scheduler's tensors are, so a kernel moves the bytes: it reads or writes
pinned host memory through the bus, in the order of its stream, and a CUDA graph may hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check, check_ids
from minivllm.ops._register import define
from minivllm.ops.store_kv import check_cache


def _check_swap(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> Check:
    check = Check("swap_blocks", source.device)
    check.tensor("source", source, "num_source_blocks num_kv_heads block_size head_dim", FLOATS)
    check_cache(check, "source", source, source.dtype, "num_source_blocks")
    if (source.device.type == "cpu") != (target.device.type == "cpu"):
        check.device = target.device
    check_cache(check, "target", target, source.dtype, "num_target_blocks")
    check.device = target.device if source.device.type == "cpu" else source.device
    check.tensor("source_ids", source_ids, "n", (torch.int64,))
    check.tensor("target_ids", target_ids, "n", (torch.int64,))
    return check


def swap_blocks_reference(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    """The op's meaning in plain PyTorch; between two devices it waits for the ids."""
    check = _check_swap(source, target, source_ids, target_ids)
    check_ids(check, "source_ids", source_ids, source.shape[0])
    check_ids(check, "target_ids", target_ids, target.shape[0])
    for name, cache in (("source", source), ("target", target)):
        if cache.device != source_ids.device and cache.numel() and not cache.is_pinned():
            check.fail(f"{name} is in host memory that is not pinned; call .pin_memory() first")
    target[target_ids.to(target.device)] = source[source_ids.to(source.device)].to(target.device)


def _swap_fake(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    _check_swap(source, target, source_ids, target_ids)


_swap_blocks = define(
    "swap_blocks",
    "(Tensor source, Tensor(a!) target, Tensor source_ids, Tensor target_ids) -> ()",
    swap_blocks_reference,
    _swap_fake,
)


def swap_blocks(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    """Block target_ids[i] of target becomes a copy of block source_ids[i] of source.

    On CUDA the call is asynchronous on the current stream: host memory may be read, freed or written by the host only
    after the stream has come so far.

    Args:
        source: [num_source_blocks, num_kv_heads, block_size, head_dim] float32, bfloat16 or float16; layout as in
            `store_kv`. On the device of target, or one of the two is on a CUDA device and the other in pinned host
            memory.
        target: [num_target_blocks, num_kv_heads, block_size, head_dim], dtype of source, written; layout as source. It
            must not overlap source.
        source_ids: [n] int64 block ids, on the CUDA device if one of the caches is; repetitions are allowed.
        target_ids: [n] int64 block ids, all different; on the device of source_ids.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides, or host memory that is not pinned; on the CPU also an id
            outside its cache, before anything is written (on CUDA such an id is undefined behaviour, because to look
            at it would stall the GPU).
    """
    _swap_blocks(source, target, source_ids, target_ids)
