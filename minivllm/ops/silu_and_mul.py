"""SwiGLU's activation: silu of the first half of a row times its second half.

silu(g) = g / (1 + e^-g); the product gates the up projection (Shazeer 2020, arXiv:2002.05202). Gate and up come from
one packed matrix product, so the op reads one tensor and writes one of half the width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check
from minivllm.ops._register import define


def _check_silu(x: Tensor) -> None:
    check = Check("silu_and_mul", x.device)
    check.tensor("x", x, "... width", FLOATS)
    if x.shape[-1] % 2:
        check.fail(f"x has shape {list(x.shape)}, expected an even last dimension (gate and up side by side)")


def silu_and_mul_reference(x: Tensor) -> Tensor:
    """The op's meaning in plain PyTorch."""
    _check_silu(x)
    gate, up = x.chunk(2, dim=-1)
    wide = gate.float()
    return ((wide * torch.sigmoid(wide)).to(x.dtype) * up).contiguous()


def _silu_fake(x: Tensor) -> Tensor:
    _check_silu(x)
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
