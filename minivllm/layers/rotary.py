"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864): one table of cosines and sines, shared by all layers of
a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minivllm.ops import rope_cos_sin_cache


class RotaryEmbedding(nn.Module):
    """The table by which attention rotates q and k (`minivllm.ops.apply_rope` says how)."""

    cos_sin: Tensor

    def __init__(self, rotary_dim: int, max_position: int, theta: float, *, device: torch.device) -> None:
        super().__init__()
        table = rope_cos_sin_cache(rotary_dim, max_position, theta).to(device)
        self.register_buffer("cos_sin", table, persistent=False)
