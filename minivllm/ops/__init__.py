"""minivllm's kernels as PyTorch ops; usable without the engine (`import minivllm.ops` needs torch alone).

Each op is registered under `torch.ops.minivllm`, has a PyTorch reference that defines its meaning, and composes with
`torch.compile`. The first import compiles the CPU kernels, and the CUDA kernels where there is a GPU; later imports
load them from a cache (see `build_info`). `MINIVLLM_OPS=reference` runs the references instead.
"""

from __future__ import annotations

from minivllm.ops._load import BuildInfo
from minivllm.ops._load import load as _load_kernels
from minivllm.ops._register import served_by
from minivllm.ops._toolchain import BuildError
from minivllm.ops.activation import gelu_and_mul, silu_and_mul
from minivllm.ops.copy_blocks import copy_blocks
from minivllm.ops.embedding import embedding
from minivllm.ops.flash_attention import flash_attention
from minivllm.ops.logprobs import token_logprobs
from minivllm.ops.merge_attention_states import merge_attention_states
from minivllm.ops.packed_linear import pack_linear_weight, packed_linear, prefers_packed
from minivllm.ops.paged_attention import paged_attention, plan_paged_attention
from minivllm.ops.penalties import apply_penalties, count_tokens
from minivllm.ops.qk_norm_rope_store import qk_norm_rope_store
from minivllm.ops.rms_norm import fused_add_rms_norm, rms_norm
from minivllm.ops.rope import apply_rope, rope_cos_sin_cache
from minivllm.ops.sample import sample
from minivllm.ops.store_kv import store_kv
from minivllm.ops.swap_blocks import swap_blocks

__all__ = [
    "BuildError",
    "BuildInfo",
    "apply_penalties",
    "apply_rope",
    "build_info",
    "copy_blocks",
    "count_tokens",
    "embedding",
    "flash_attention",
    "fused_add_rms_norm",
    "gelu_and_mul",
    "merge_attention_states",
    "pack_linear_weight",
    "packed_linear",
    "paged_attention",
    "plan_paged_attention",
    "prefers_packed",
    "qk_norm_rope_store",
    "rms_norm",
    "rope_cos_sin_cache",
    "sample",
    "served_by",
    "silu_and_mul",
    "store_kv",
    "swap_blocks",
    "token_logprobs",
]

_info = _load_kernels()


def build_info() -> BuildInfo:
    """What serves the ops in this process: compiled kernels or references, from where, and why not more."""
    return _info
