"""RMSNorm, alone and fused with the residual addition before it.

y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467). The mean is
taken in float32; the normalised value is rounded to x's dtype before the product with the weight, as Hugging Face's
models do, so that bfloat16 results agree with theirs bit for bit up to the order of the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check
from minivllm.ops._register import define


def _check_rms_norm(x: Tensor, weight: Tensor) -> None:
    check = Check("rms_norm", x.device)
    check.tensor("x", x, "... hidden", FLOATS)
    check.tensor("weight", weight, "hidden", (x.dtype,))


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The op's meaning in plain PyTorch."""
    _check_rms_norm(x, weight)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * normed.to(x.dtype)).contiguous()


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _check_rms_norm(x, weight)
    return x.new_empty(x.shape)


_rms_norm = define("rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor", rms_norm_reference, _rms_norm_fake)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of the last dimension.

    Args:
        x: [..., hidden] float32, bfloat16 or float16; last dimension contiguous, and the leading dimensions must
        collapse to
            two strides (so a `[tokens, heads, head_dim]` view of a packed qkv tensor is fine).
        weight: [hidden], dtype of x.
        eps: added to the mean of squares.

    Returns:
        A new contiguous tensor of x's shape and dtype.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides.
    """
    out: Tensor = _rms_norm(x, weight, eps)
    return out


def _check_fused(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    check = Check("fused_add_rms_norm", x.device)
    check.tensor("x", x, "... hidden", FLOATS)
    check.tensor("residual", residual, "... hidden", (x.dtype,))
    check.tensor("weight", weight, "hidden", (x.dtype,))
    if residual.shape != x.shape:
        check.fail(f"residual has shape {list(residual.shape)}, expected x's {list(x.shape)}")


def fused_add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """The op's meaning in plain PyTorch."""
    _check_fused(x, residual, weight)
    residual.add_(x)
    x.copy_(rms_norm_reference(residual, weight, eps))


def _fused_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    _check_fused(x, residual, weight)


_fused_add_rms_norm = define(
    "fused_add_rms_norm",
    "(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps) -> ()",
    fused_add_rms_norm_reference,
    _fused_fake,
)


def fused_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """In place: residual <- residual + x (rounded to the dtype), then x <- rms_norm(residual, weight, eps).

    Args:
        x: [..., hidden] float32, bfloat16 or float16, written; strides as in `rms_norm`.
        residual: like x, written; it must not share memory with x.
        weight: [hidden], dtype of x.
        eps: added to the mean of squares.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides.
    """
    _fused_add_rms_norm(x, residual, weight, eps)
