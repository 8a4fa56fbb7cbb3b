"""RMSNorm as a layer: alone, or fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivllm.ops import fused_add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """`minivllm.ops.rms_norm` over the last dimension, with its weight."""

    def __init__(self, hidden_size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=device), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual += x, then x = norm(residual); both in place. Returns x."""
        fused_add_rms_norm(x, residual, self.weight, self.eps)
        return x
