"""flash_attention over sequences of one length, against scaled_dot_product_attention and FlashInfer, all causal.

PyTorch gets its best case: a dense batch, keys and values contiguous for each head. On a GPU its FlashAttention-2 and
its cuDNN kernel are asked for by name.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from cases import CPU_MODELS, LARGE, Case, cases
from conftest import Measure
from peers import flashinfer, workspace
from timing import Call
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from minivllm import ops

TOKENS = 16_384


@cache
def planned(backend: str, batch: int, tokens: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace(), "NHD", backend=backend)
    lengths = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * tokens
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(lengths, lengths, num_heads, num_kv_heads, head_dim, causal=True, **types)
    return wrapper


def in_torch(way: str, q: Tensor, k: Tensor, v: Tensor, batch: int) -> Call:
    # [batch, heads, tokens, head_dim], as PyTorch wants them
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous() for x in (q, k, v))
    if way == "torch,cudnn":  # which has no grouped queries
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    backends = {"torch,flash": [SDPBackend.FLASH_ATTENTION], "torch,cudnn": [SDPBackend.CUDNN_ATTENTION]}

    def call() -> Tensor:
        with sdpa_kernel(backends.get(way, list(SDPBackend.__members__.values()))):
            return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=way != "torch,cudnn")

    return call


def run(measure: Measure, case: Case) -> None:
    batch, tokens, num_heads, num_kv_heads, head_dim = case.sizes
    lengths = case.ints(range(0, (batch + 1) * tokens, tokens))

    def make() -> Call:
        q = case.randn(batch * tokens, num_heads, head_dim)
        k, v = case.randn(2, batch * tokens, num_kv_heads, head_dim)
        if case.way.startswith("torch"):
            return in_torch(case.way, q, k, v, batch)
        if case.way.startswith("flashinfer"):
            wrapper = planned(case.way.partition(",")[2], *case.sizes)
            return lambda: wrapper.run(q, k, v)
        scale = head_dim**-0.5
        return lambda: ops.flash_attention(q, k, v, lengths, lengths, tokens, tokens, scale=scale)

    measure(
        case,
        make,
        gigabytes=2 * batch * tokens * (num_heads + num_kv_heads) * head_dim * case.dtype.itemsize / 1e9,
        gigaflops=4 * batch * num_heads * head_dim * tokens * (tokens + 1) / 2 / 1e9,
    )


NAMES = "batch tokens heads kv_heads head_dim"


@cases(
    "flash_attention",
    "minivllm torch",
    NAMES,
    cpu=[(1, tokens, m.num_heads, m.num_kv_heads, m.head_dim) for m in CPU_MODELS for tokens in (16, 128, 512, 1024)],
)
def test_prefill(measure: Measure, case: Case) -> None:
    run(measure, case)


@cases(
    "flash_attention",
    "minivllm torch,flash torch,cudnn flashinfer,fa2 flashinfer,fa3",
    NAMES,
    cuda=[
        (TOKENS // tokens, tokens, LARGE.num_heads, LARGE.num_kv_heads, LARGE.head_dim)
        for tokens in (512, 1024, 2048, 4096, 8192, 16_384)
    ],
)
def test_prefill_of_16k_tokens(measure: Measure, case: Case) -> None:
    run(measure, case)
