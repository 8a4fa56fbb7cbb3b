"""The SwiGLU feed-forward block (Shazeer 2020, arXiv:2002.05202): gate and up as one product, one fused activation,
down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivllm.layers.linear import FusedLinear, Linear
from minivllm.ops import silu_and_mul


class SwiGLU(nn.Module):
    """x: [num_tokens, hidden_size] -> [num_tokens, hidden_size]."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        splits = (intermediate_size, intermediate_size)
        self.gate_up_proj = FusedLinear(hidden_size, splits, dtype=dtype, device=device)
        self.down_proj = Linear(intermediate_size, hidden_size, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(silu_and_mul(self.gate_up_proj(x)))
        return out
