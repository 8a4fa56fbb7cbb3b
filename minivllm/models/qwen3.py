"""Qwen3 (Qwen Team 2025, arXiv:2505.09388): pre-norm decoder, grouped-query attention with per-head RMSNorm of q and k,
SwiGLU.

The residual stream is carried beside x, so that each addition and the norm after it are one kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from minivllm.config import ModelConfig
from minivllm.layers.attention import Attention
from minivllm.layers.embedding import Embedding
from minivllm.layers.linear import Linear
from minivllm.layers.mlp import SwiGLU
from minivllm.layers.norm import RMSNorm
from minivllm.layers.rotary import RotaryEmbedding
from minivllm.models.base import CausalLM

if TYPE_CHECKING:
    from minivllm.runner.forward_batch import ForwardBatch
    from minivllm.runner.kv_cache import KVCache, LayerKV


class Qwen3Layer(nn.Module):
    """One decoder layer."""

    def __init__(
        self, config: ModelConfig, rotary: RotaryEmbedding, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.self_attn = Attention(config, rotary, qk_norm=True, dtype=dtype, device=device)
        self.post_attention_layernorm = RMSNorm(hidden, eps, dtype=dtype, device=device)
        self.mlp = SwiGLU(hidden, config.intermediate_size, dtype=dtype, device=device)

    def forward(self, x: Tensor, residual: Tensor | None, fwd: ForwardBatch, kv: LayerKV) -> tuple[Tensor, Tensor]:
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, fwd, kv)
        x = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class Qwen3Model(nn.Module):
    """Embedding, layers and the final norm."""

    def __init__(self, config: ModelConfig, max_position: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        rotary = RotaryEmbedding(config.head_dim, max_position, config.rope_theta, device=device)
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, is_head=config.tie_word_embeddings, dtype=dtype, device=device
        )
        layers = (Qwen3Layer(config, rotary, dtype=dtype, device=device) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=device)

    def forward(self, fwd: ForwardBatch, kv: KVCache) -> Tensor:
        x: Tensor = self.embed_tokens(fwd.input_ids)
        residual: Tensor | None = None
        for layer, layer_kv in zip(self.layers, kv.layers, strict=True):
            x, residual = layer(x, residual, fwd, layer_kv)
        assert residual is not None, "a model has at least one layer"
        return self.norm.add(x, residual)


class Qwen3ForCausalLM(CausalLM):
    """Qwen3 with its output head, tied to the embedding or not."""

    fused_weights = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }

    def __init__(self, config: ModelConfig, max_position: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.model = Qwen3Model(config, max_position, dtype=dtype, device=device)
        self.lm_head: Linear | None = None
        if config.tie_word_embeddings:
            self.unused_weights = ("lm_head.weight",)
        else:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype=dtype, device=device)

    def forward(self, fwd: ForwardBatch, kv: KVCache) -> Tensor:
        hidden: Tensor = self.model(fwd, kv)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.model.embed_tokens.as_head if self.lm_head is None else self.lm_head
        logits: Tensor = head(hidden)
        return logits
