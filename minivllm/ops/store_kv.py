"""The layout of the paged key-value cache, and the op that writes new keys and values into it.

k_cache and v_cache are each [num_blocks, num_kv_heads, block_size, head_dim]: a block holds block_size tokens of one
sequence, and within it the tokens of one head lie next to each other, so attention reads one contiguous piece of
memory for each block and head. A token's place is its slot = block_id * block_size + offset in the block. block_size
is a power of two from 8 to 256. Blocks may lie apart by any stride (keys and values of a layer in one allocation,
say), but each block is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check, check_ids
from minivllm.ops._register import define

BLOCK_SIZES = (8, 16, 32, 64, 128, 256)


def check_cache(check: Check, name: str, cache: Tensor, dtype: torch.dtype, blocks: str = "num_blocks") -> None:
    """A cache in the layout above; binds num_blocks (or the word in `blocks`), num_kv_heads, block_size and
    head_dim."""
    check.tensor(name, cache, f"{blocks} num_kv_heads block_size head_dim", (dtype,))
    _, num_kv_heads, block_size, head_dim = cache.shape
    if block_size not in BLOCK_SIZES:
        check.fail(f"{name} has block_size={block_size}, expected a power of two from 8 to 256")
    if cache.stride(2) != head_dim or (num_kv_heads > 1 and cache.stride(1) != block_size * head_dim):
        check.fail(
            f"{name} has strides {list(cache.stride())}, expected each block (dimensions 1 to 3) to be contiguous"
        )


def _check_store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> Check:
    check = Check("store_kv", k.device)
    check.tensor("k", k, "num_tokens num_kv_heads head_dim", FLOATS)
    check.tensor("v", v, "num_tokens num_kv_heads head_dim", (k.dtype,))
    check_cache(check, "k_cache", k_cache, k.dtype)
    check_cache(check, "v_cache", v_cache, k.dtype)
    check.tensor("slot_mapping", slot_mapping, "num_tokens", (torch.int64,))
    return check


def check_slots(check: Check, slot_mapping: Tensor) -> None:
    """slot_mapping: [num_tokens] int64 has no slot beyond the cache; negative ones skip their token."""
    check_ids(check, "slot_mapping", slot_mapping, check.sizes["num_blocks"] * check.sizes["block_size"], lowest=None)


def store_kv_reference(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """The op's meaning in plain PyTorch.

    Without host syncs on CUDA: a skipped token repeats the write of the first token that is not skipped, and where
    all are skipped, what lies in slot 0 is written back.
    """
    check_slots(_check_store(k, v, k_cache, v_cache, slot_mapping), slot_mapping)
    if not slot_mapping.numel() or not k_cache.numel():
        return
    kept = slot_mapping >= 0
    tokens = torch.arange(len(kept), device=kept.device)
    source = torch.where(kept, tokens, kept.int().argmax())
    slots = slot_mapping[source].clamp(min=0)
    block, offset = slots // k_cache.shape[2], slots % k_cache.shape[2]
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache[block, :, offset] = torch.where(kept.any(), new[source], cache[block, :, offset])


def _store_fake(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    _check_store(k, v, k_cache, v_cache, slot_mapping)


_store_kv = define(
    "store_kv",
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) -> ()",
    store_kv_reference,
    _store_fake,
)


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write the keys and values of new tokens into their slots of the cache.

    Args:
        k: [num_tokens, num_kv_heads, head_dim] float32, bfloat16 or float16; last dimension contiguous, any other
            strides.
        v: like k.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of k, written; layout as this file's head says.
        v_cache: like k_cache, written; it must not overlap k_cache.
        slot_mapping: [num_tokens] int64; a negative slot skips its token. Two tokens must not share a slot.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides; on the CPU also a slot >= num_blocks * block_size, before
            anything is written (on CUDA such a slot is undefined behaviour, because to look at it would stall the
            GPU).
    """
    _store_kv(k, v, k_cache, v_cache, slot_mapping)
