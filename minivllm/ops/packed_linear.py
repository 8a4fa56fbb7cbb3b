"""x W^T on a CPU in float32, with W packed once into panels, so that a decode step streams each weight exactly once.

A panel holds 32 outputs: for each input feature, the 32 weights that it meets lie side by side, which is what a
register tile of outputs reads (Goto and van de Geijn 2008, "Anatomy of high-performance matrix multiplication").
Weights that are all bfloat16 numbers, as those of most checkpoints are, are kept as bfloat16: half the bytes, and not a
bit of difference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import Check
from minivllm.ops._register import define, has_kernel

PANEL = 32


def prefers_packed(weight: Tensor) -> bool:
    """Whether `packed_linear` is the faster product for this weight: float32 on a CPU, where its kernel was
    compiled."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and has_kernel("packed_linear", "CPU")


def pack_linear_weight(weight: Tensor) -> Tensor:
    """Pack a weight for `packed_linear`.

    Args:
        weight: [out_features, in_features] float32 or bfloat16.

    Returns:
        [ceil(out_features / 32), in_features, 32], rows beyond out_features zero: bfloat16 where that holds every
        weight exactly, else float32.

    Raises:
        RuntimeError: wrong dtype or shape.
    """
    Check("pack_linear_weight", weight.device).tensor(
        "weight", weight, "out_features in_features", (torch.float32, torch.bfloat16)
    )
    narrow = weight.to(torch.bfloat16)
    exact = bool((narrow == weight).all())
    padding = -weight.shape[0] % PANEL
    rows = torch.nn.functional.pad(narrow if exact else weight, (0, 0, 0, padding))
    packed: Tensor = rows.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
    return packed


def _check_packed(x: Tensor, packed: Tensor, out_features: int) -> None:
    check = Check("packed_linear", x.device)
    check.tensor("x", x, "num_tokens in_features", (torch.float32,))
    check.tensor("packed", packed, f"panels in_features {PANEL}", (torch.float32, torch.bfloat16))
    if not packed.is_contiguous():
        check.fail("packed must be contiguous, as pack_linear_weight returns it")
    if (out_features + PANEL - 1) // PANEL != packed.shape[0]:
        check.fail(f"out_features={out_features} does not belong to {packed.shape[0]} panels of {PANEL}")


def packed_linear_reference(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """The op's meaning in plain PyTorch."""
    _check_packed(x, packed, out_features)
    weight = packed.transpose(1, 2).flatten(0, 1)[:out_features]
    return torch.nn.functional.linear(x, weight.float())


def _packed_linear_fake(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    _check_packed(x, packed, out_features)
    return x.new_empty((x.shape[0], out_features))


_packed_linear = define(
    "packed_linear",
    "(Tensor x, Tensor packed, SymInt out_features) -> Tensor",
    packed_linear_reference,
    _packed_linear_fake,
)


def packed_linear(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """x W^T for a W packed by `pack_linear_weight`. On a CPU a row's bits do not depend on the other rows of x.

    Args:
        x: [num_tokens, in_features] float32; last dimension contiguous, any row stride.
        packed: [ceil(out_features / 32), in_features, 32] float32 or bfloat16.
        out_features: rows of W.

    Returns:
        [num_tokens, out_features] float32, contiguous.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides.
    """
    out: Tensor = _packed_linear(x, packed, out_features)
    return out
