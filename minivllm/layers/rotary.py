"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): one table of cosines and sines, shared by all layers of
a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivllm.ops import apply_rope, rope_cos_sin_cache


class RotaryEmbedding(nn.Module):
    """Rotates q and k in place by their positions."""

    cos_sin: Tensor

    def __init__(self, rotary_dim: int, max_position: int, theta: float, *, device: torch.device) -> None:
        super().__init__()
        table = rope_cos_sin_cache(rotary_dim, max_position, theta).to(device)
        self.register_buffer("cos_sin", table, persistent=False)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> None:
        """q: [num_tokens, num_heads, head_dim], k: [num_tokens, num_kv_heads, head_dim], positions: [num_tokens]."""
        apply_rope(q, k, positions, self.cos_sin)
