"""The activations of gated feed-forward blocks: silu or gelu of the first half of a row times its second half.

silu(g) = g / (1 + e^-g) and gelu(g) = g * Phi(g), Phi the normal distribution (Hendrycks and Gimpel 2016,
arXiv:1606.08415); the product gates the up projection (SwiGLU and GeGLU, Shazeer 2020, arXiv:2002.05202). Gate and up
come from one packed matrix product, so the ops read one tensor and write one of half the width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from minivllm.ops._check import FLOATS, Check
from minivllm.ops._register import define


def _check_gated(op: str, x: Tensor) -> None:
    check = Check(op, x.device)
    check.tensor("x", x, "... width", FLOATS)
    if x.shape[-1] % 2:
        check.fail(f"x has shape {list(x.shape)}, expected an even last dimension (gate and up side by side)")


def silu_and_mul_reference(x: Tensor) -> Tensor:
    """The op's meaning in plain PyTorch."""
    _check_gated("silu_and_mul", x)
    gate, up = x.chunk(2, dim=-1)
    wide = gate.float()
    return ((wide * torch.sigmoid(wide)).to(x.dtype) * up).contiguous()


def _silu_fake(x: Tensor) -> Tensor:
    _check_gated("silu_and_mul", x)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_silu_and_mul = define("silu_and_mul", "(Tensor x) -> Tensor", silu_and_mul_reference, _silu_fake)


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(x[..., :d]) * x[..., d:].

    The arithmetic is float32; silu is rounded to the dtype before the product, as Hugging Face's models do.

    Args:
        x: [..., 2 * d] float32, bfloat16 or float16; last dimension contiguous, and the leading dimensions must
            collapse to two strides.

    Returns:
        A new contiguous tensor [..., d] of x's dtype.

    Raises:
        RuntimeError: wrong dtype, shape or strides.
    """
    out: Tensor = _silu_and_mul(x)
    return out


def gelu_and_mul_reference(x: Tensor, *, tanh: bool = False) -> Tensor:
    """The op's meaning in plain PyTorch."""
    _check_gated("gelu_and_mul", x)
    gate, up = x.chunk(2, dim=-1)
    active = functional.gelu(gate.float(), approximate="tanh" if tanh else "none")
    return (active.to(x.dtype) * up).contiguous()


def _gelu_fake(x: Tensor, *, tanh: bool = False) -> Tensor:
    _check_gated("gelu_and_mul", x)
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


_gelu_and_mul = define("gelu_and_mul", "(Tensor x, *, bool tanh=False) -> Tensor", gelu_and_mul_reference, _gelu_fake)


def gelu_and_mul(x: Tensor, *, approximate: str = "none") -> Tensor:
    """gelu(x[..., :d]) * x[..., d:], the activation of Gemma's feed-forward blocks.

    The arithmetic is float32; gelu is rounded to the dtype before the product, as Hugging Face's models do.

    Args:
        x: as in `silu_and_mul`.
        approximate: "none" is g * Phi(g); "tanh" is g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))), as
            `torch.nn.functional.gelu` names them.

    Returns:
        A new contiguous tensor [..., d] of x's dtype.

    Raises:
        RuntimeError: wrong dtype, shape or strides, or an unknown `approximate`.
    """
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"minivllm::gelu_and_mul: approximate is {approximate!r}, expected 'none' or 'tanh'")
    out: Tensor = _gelu_and_mul(x, tanh=approximate == "tanh")
    return out
