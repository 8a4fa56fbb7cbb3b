"""Dense layers. A fused layer holds several checkpoint matrices stacked by rows, so that one matrix product serves them
all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# From this many rows on, oneDNN's float32 product is the faster one on a CPU: measured on an AMD EPYC with torch 2.13,
# 2 x MKL (which F.linear calls) at 64 rows, level at 4; below that MKL wins. Narrow dtypes go to oneDNN anyway.
_ONEDNN_ROWS = 4
_HAS_ONEDNN = torch.backends.mkldnn.is_available()


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [num_tokens, in_features] times weight [out_features, in_features] transposed, plus bias [out_features]."""
    if _HAS_ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[0] >= _ONEDNN_ROWS:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product
    return F.linear(x, weight, bias)


class Linear(nn.Module):
    """y = x W^T (+ b). x: [num_tokens, in_features] -> [num_tokens, out_features]. Parameters start uninitialised."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device), requires_grad=False
        )
        empty_bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty_bias is None else nn.Parameter(empty_bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return dense(x, self.weight, self.bias)


class FusedLinear(Linear):
    """Several matrices of one input stacked by rows; `splits` are their row counts in order (the weight loader needs
    them)."""

    def __init__(
        self, in_features: int, splits: tuple[int, ...], *, bias: bool = False, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(in_features, sum(splits), bias=bias, dtype=dtype, device=device)
        self.splits = splits
