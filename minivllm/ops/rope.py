"""Rotary position embedding of queries and keys, in place, with cosines and sines from a table.

Every pair (a, b) of a head turns by the angle position * theta^(-2i / rotary_dim): (a cos - b sin, b cos + a sin) (Su
et al. 2021, arXiv:2104.09864). The table is computed in float64, so that it stays right where float32 angles have
lost their fraction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, INTS, Check
from minivllm.ops._register import define

_TABLE_ROWS = 16384  # rows of float64 angles that exist at one time


def rope_cos_sin_cache(
    rotary_dim: int, max_position: int, theta: float = 10000.0, *, device: torch.device | str | None = None
) -> Tensor:
    """The table of `apply_rope`: for each position the cosines of its rotary_dim / 2 angles, then their sines.

    Args:
        rotary_dim: how many elements of a head turn; even.
        max_position: number of rows; positions 0 .. max_position - 1.
        theta: base of the frequencies theta^(-2i / rotary_dim).
        device: where the table lies; PyTorch's default device if None.

    Returns:
        float32 [max_position, rotary_dim], each value the float64 result rounded once.

    Raises:
        RuntimeError: rotary_dim not even and positive, max_position or theta not positive.
    """
    if rotary_dim <= 0 or rotary_dim % 2:
        raise RuntimeError(f"minivllm::rope_cos_sin_cache: rotary_dim is {rotary_dim}, expected an even number > 0")
    if max_position <= 0 or not theta > 0:
        raise RuntimeError(
            f"minivllm::rope_cos_sin_cache: max_position is {max_position} and theta is {theta}, expected numbers > 0"
        )
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim
    frequencies = torch.pow(theta, -exponents)
    table = torch.empty(max_position, rotary_dim, dtype=torch.float32, device=device)
    for start in range(0, max_position, _TABLE_ROWS):
        rows = table[start : start + _TABLE_ROWS]
        positions = torch.arange(start, start + len(rows), dtype=torch.float64, device=device)
        angles = torch.outer(positions, frequencies)
        rows.copy_(torch.cat((angles.cos(), angles.sin()), dim=-1))
    return table


def check_table(check: Check, positions: Tensor, cos_sin_cache: Tensor) -> None:
    """Binds max_position and rotary_dim; num_tokens and head_dim are bound before."""
    check.tensor("positions", positions, "num_tokens", INTS)
    check.tensor("cos_sin_cache", cos_sin_cache, "max_position rotary_dim", (torch.float32,))
    rotary_dim, head_dim = check.sizes["rotary_dim"], check.sizes["head_dim"]
    if rotary_dim % 2 or rotary_dim > head_dim:
        check.fail(f"cos_sin_cache has rotary_dim={rotary_dim}, expected an even number up to head_dim={head_dim}")


def check_positions(check: Check, positions: Tensor) -> None:
    """Every position has its row in the table. On the CPU alone: to look at a GPU's values would stall it."""
    if positions.device.type != "cpu" or not positions.numel():
        return
    last = check.sizes["max_position"] - 1
    low, high = (int(value) for value in positions.aminmax())
    if low < 0 or high > last:
        bad = low if low < 0 else high
        check.fail(f"positions holds {bad}, expected 0 to {last} (the rows of cos_sin_cache)")


def _check_rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> Check:
    check = Check("apply_rope", q.device)
    check.tensor("q", q, "num_tokens num_heads head_dim", FLOATS)
    check.tensor("k", k, "num_tokens num_kv_heads head_dim", (q.dtype,))
    check_table(check, positions, cos_sin_cache)
    return check


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    """x: [num_tokens, heads, rotary_dim], written; cos, sin: float32 [num_tokens, 1, rotary_dim / 2]."""
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    wide_a, wide_b = a.float(), b.float()
    turned_a, turned_b = wide_a * cos - wide_b * sin, wide_b * cos + wide_a * sin
    a.copy_(turned_a)
    b.copy_(turned_b)


def apply_rope_reference(
    q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False
) -> None:
    """The op's meaning in plain PyTorch. Without host syncs on CUDA."""
    check_positions(_check_rope(q, k, positions, cos_sin_cache), positions)
    rotary_dim = cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    for x in (q, k):
        _rotate(x[..., :rotary_dim], cos, sin, interleaved)


def _rope_fake(q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False) -> None:
    _check_rope(q, k, positions, cos_sin_cache)


_apply_rope = define(
    "apply_rope",
    "(Tensor(a!) q, Tensor(b!) k, Tensor positions, Tensor cos_sin_cache, *, bool interleaved=False) -> ()",
    apply_rope_reference,
    _rope_fake,
)


def apply_rope(q: Tensor, k: Tensor, positions: Tensor, cos_sin_cache: Tensor, *, interleaved: bool = False) -> None:
    """Turn the first rotary_dim elements of every head of q and k by their token's position, in place.

    The arithmetic is float32, rounded once to the dtype of q. Elements from rotary_dim on stay as they are.

    Args:
        q: [num_tokens, num_heads, head_dim] float32, bfloat16 or float16, written; the last dimension contiguous, any
            other strides (a view of a packed qkv tensor is fine).
        k: [num_tokens, num_kv_heads, head_dim], dtype of q, written; strides as q; it must not overlap q.
        positions: [num_tokens] int64 or int32, each in 0 .. max_position - 1.
        cos_sin_cache: [max_position, rotary_dim] float32, from `rope_cos_sin_cache`; rotary_dim is even and at most
            head_dim.
        interleaved: which elements are a pair: (i, i + rotary_dim / 2) as in GPT-NeoX and Llama if False, (2i, 2i +
            1) as in GPT-J if True.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides; on the CPU also a position outside the table (on CUDA
            such a position is undefined behaviour, because to look at it would stall the GPU).
    """
    _apply_rope(q, k, positions, cos_sin_cache, interleaved=interleaved)
