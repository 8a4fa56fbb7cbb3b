"""Dense layers. A fused layer holds several checkpoint matrices stacked by rows, so that one matrix product serves them
all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivllm.ops import pack_linear_weight, packed_linear, prefers_packed


class Linear(nn.Module):
    """y = x W^T (+ b). x: [num_tokens, in_features] -> [num_tokens, out_features]. Parameters start uninitialised."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.out_features = out_features
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        empty_bias = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if empty_bias is None else nn.Parameter(empty_bias, requires_grad=False)
        self.packed: Tensor | None = None

    def pack(self) -> None:
        """Called once the weights are loaded: where the packed product is faster, it takes the weight's place."""
        if prefers_packed(self.weight):
            self.packed = pack_linear_weight(self.weight)
            self.weight.data = self.weight.data.new_empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.weight, self.bias)
        product = packed_linear(x, self.packed, self.out_features)
        return product if self.bias is None else product.add_(self.bias)


class FusedLinear(Linear):
    """Several matrices of one input stacked by rows; `splits` are their row counts in order, for the weight loader."""

    def __init__(
        self, in_features: int, splits: tuple[int, ...], *, bias: bool = False, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(in_features, sum(splits), bias=bias, dtype=dtype, device=device)
        self.splits = splits
