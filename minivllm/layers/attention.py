"""Grouped-query attention over the paged KV cache: project, normalise and rotate q and k, write k and v, attend,
project.

Prefill chunks and decode rows go through the same calls: a row's queries see its whole cached prefix through its block
table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minivllm.config import ModelConfig
from minivllm.layers.linear import FusedLinear, Linear
from minivllm.layers.norm import RMSNorm
from minivllm.layers.rotary import RotaryEmbedding
from minivllm.ops import paged_attention, qk_norm_rope_store

if TYPE_CHECKING:
    from minivllm.runner.forward_batch import ForwardBatch
    from minivllm.runner.kv_cache import LayerKV


class Attention(nn.Module):
    """x: [num_tokens, hidden_size] -> [num_tokens, hidden_size]. `qk_norm`: RMSNorm of each head of q and k (Qwen3)."""

    def __init__(
        self,
        config: ModelConfig,
        rotary: RotaryEmbedding,
        *,
        qk_norm: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.scale = config.head_dim**-0.5
        self.rotary = rotary
        self.norm_eps = config.rms_norm_eps
        splits = tuple(heads * config.head_dim for heads in self.heads)
        self.qkv_proj = FusedLinear(config.hidden_size, splits, dtype=dtype, device=device)
        self.o_proj = Linear(splits[0], config.hidden_size, dtype=dtype, device=device)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype=dtype, device=device) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps, dtype=dtype, device=device) if qk_norm else None

    def forward(self, x: Tensor, fwd: ForwardBatch, kv: LayerKV) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=1)
        qk_norm_rope_store(
            q,
            k,
            v,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            fwd.positions,
            self.rotary.cos_sin,
            kv.k,
            kv.v,
            fwd.slot_mapping,
            eps=self.norm_eps,
        )
        out = paged_attention(
            q,
            kv.k,
            kv.v,
            fwd.block_tables,
            fwd.seq_lens,
            fwd.cu_seqlens_q,
            fwd.max_seqlen_q,
            scale=self.scale,
            plan=fwd.attention_plan,
        )
        projected: Tensor = self.o_proj(out.flatten(1))
        return projected
