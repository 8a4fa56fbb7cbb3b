"""What lies between the projection of queries, keys and values and attention, as one pass over them: RMSNorm of every
head of q and k, rotary embedding, and the write of keys and values into the paged cache.

The meaning is `rms_norm`, `apply_rope` and `store_kv` one after the other, with their roundings. One kernel reads each
value once and writes it once, where the four calls read and write q and k three times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check
from minivllm.ops._register import define
from minivllm.ops.rms_norm import rms_norm_reference
from minivllm.ops.rope import apply_rope_reference, check_positions, check_table
from minivllm.ops.store_kv import check_cache, check_slots, store_kv_reference


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    cos_sin_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Check:
    check = Check("qk_norm_rope_store", q.device)
    check.tensor("q", q, "num_tokens num_heads head_dim", FLOATS)
    check.tensor("k", k, "num_tokens num_kv_heads head_dim", (q.dtype,))
    check.tensor("v", v, "num_tokens num_kv_heads head_dim", (q.dtype,))
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check.tensor(name, weight, "head_dim", (q.dtype,))
    check_table(check, positions, cos_sin_cache)
    check_cache(check, "k_cache", k_cache, q.dtype)
    check_cache(check, "v_cache", v_cache, q.dtype)
    check.tensor("slot_mapping", slot_mapping, "num_tokens", (torch.int64,))
    return check


def qk_norm_rope_store_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    cos_sin_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    eps: float,
    interleaved: bool = False,
) -> None:
    """The op's meaning in plain PyTorch. Without host syncs on CUDA."""
    check = _check(q, k, v, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, slot_mapping)
    check_positions(check, positions)
    check_slots(check, slot_mapping)
    if q_weight is not None:
        q.copy_(rms_norm_reference(q, q_weight, eps))
    keys = k.clone() if k_weight is None else rms_norm_reference(k, k_weight, eps)
    apply_rope_reference(q, keys, positions, cos_sin_cache, interleaved=interleaved)
    store_kv_reference(keys, v, k_cache, v_cache, slot_mapping)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    cos_sin_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    eps: float,
    interleaved: bool = False,
) -> None:
    _check(q, k, v, q_weight, k_weight, positions, cos_sin_cache, k_cache, v_cache, slot_mapping)


_qk_norm_rope_store = define(
    "qk_norm_rope_store",
    "(Tensor(a!) q, Tensor k, Tensor v, Tensor? q_weight, Tensor? k_weight, Tensor positions, Tensor cos_sin_cache, "
    "Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor slot_mapping, *, float eps, bool interleaved=False) -> ()",
    qk_norm_rope_store_reference,
    _fake,
)


def qk_norm_rope_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    positions: Tensor,
    cos_sin_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    eps: float,
    interleaved: bool = False,
) -> None:
    """Normalise and rotate q in place; write k, normalised and rotated, and v into their slots of the cache.

    k and v themselves are not written. Results are those of `rms_norm`, `apply_rope` and `store_kv` one after the
    other; on a GPU the order of the sum of squares may differ where head_dim is no power of two or turns in part.

    Args:
        q: [num_tokens, num_heads, head_dim] float32, bfloat16 or float16, written; the last dimension contiguous, any
            other strides (q, k and v are usually views of one packed tensor).
        k: [num_tokens, num_kv_heads, head_dim], dtype of q; strides as q; it must not overlap q.
        v: like k.
        q_weight: [head_dim], dtype of q: weight of the RMSNorm of each head of q; None leaves the norm out.
        k_weight: like q_weight, for k.
        positions: [num_tokens] int64 or int32, each in 0 .. max_position - 1.
        cos_sin_cache: [max_position, rotary_dim] float32, from `rope_cos_sin_cache`; rotary_dim is even and at most
            head_dim.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of q, written; layout as in `store_kv`.
        v_cache: like k_cache, written; it must not overlap k_cache.
        slot_mapping: [num_tokens] int64; a negative slot stores nothing for its token (its q is still written). Two
            tokens must not share a slot.
        eps: added to the mean of squares.
        interleaved: which elements are a pair, as in `apply_rope`.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides; on the CPU also a position outside the table or a slot >=
            num_blocks * block_size, before anything is written (on CUDA both are undefined behaviour, because to look
            at them would stall the GPU).
    """
    _qk_norm_rope_store(
        q,
        k,
        v,
        q_weight,
        k_weight,
        positions,
        cos_sin_cache,
        k_cache,
        v_cache,
        slot_mapping,
        eps=eps,
        interleaved=interleaved,
    )
