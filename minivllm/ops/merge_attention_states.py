"""Merges two partial attention results over disjoint keys into the result over all of them.

A partial result is its output and, for each row, the natural log of its sum of exponentials (lse); softmax over the
union weighs each side by exp(its lse) (Milakov and Gimelshein 2018, arXiv:1805.02867; for attention states Ye et al.
2025, arXiv:2501.01005). So a shared prefix may be attended to once for many sequences, or keys on several devices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check
from minivllm.ops._register import define


def _check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    check = Check("merge_attention_states", out_a.device)
    check.tensor("out_a", out_a, "num_tokens num_heads head_dim", FLOATS)
    check.tensor("lse_a", lse_a, "num_tokens num_heads", (torch.float32,))
    check.tensor("out_b", out_b, "num_tokens num_heads head_dim", (out_a.dtype,))
    check.tensor("lse_b", lse_b, "num_tokens num_heads", (torch.float32,))


def merge_attention_states_reference(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """The op's meaning in plain PyTorch; it never waits for the device."""
    _check_merge(out_a, lse_a, out_b, lse_b)
    lses = torch.stack((lse_a, lse_b))
    empty = lses == -torch.inf
    largest = lses.amax(0)
    masses = (lses - largest).exp().masked_fill(empty, 0)
    mass = masses.sum(0)
    nothing = empty.all(0)
    shares = (masses / mass).masked_fill(nothing, 0).unsqueeze(-1)
    a, b = (out.float().masked_fill(none.unsqueeze(-1), 0) for out, none in zip((out_a, out_b), empty, strict=True))
    out = (shares[0] * a + shares[1] * b).to(out_a.dtype)
    return out.contiguous(), (largest + mass.log()).masked_fill(nothing, -torch.inf).contiguous()


def _merge_fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    _check_merge(out_a, lse_a, out_b, lse_b)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


_merge_attention_states = define(
    "merge_attention_states",
    "(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    merge_attention_states_reference,
    _merge_fake,
)


def merge_attention_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out = (e^lse_a out_a + e^lse_b out_b) / (e^lse_a + e^lse_b) and lse = log(e^lse_a + e^lse_b), in float32.

    Args:
        out_a: [num_tokens, num_heads, head_dim] float32, bfloat16 or float16; last dimension contiguous, any other
            strides.
        lse_a: [num_tokens, num_heads] float32, natural logarithms; last dimension contiguous. -inf is a side without
            keys, whose out is not looked at.
        out_b: like out_a, over other keys.
        lse_b: like lse_a.

    Returns:
        out, contiguous, shape and dtype of out_a, and lse, contiguous, shape and dtype of lse_a. A row without keys on
        either side is 0 with lse -inf; one with a NaN or +inf in its lse is NaN.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides.
    """
    out: tuple[Tensor, Tensor] = _merge_attention_states(out_a, lse_a, out_b, lse_b)
    return out
