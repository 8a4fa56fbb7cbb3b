"""flash_attention against scaled_dot_product_attention.

PyTorch gets its best case: sequences of one length, keys and values contiguous for each head.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Measure, Model
from torch.nn import functional

from minivllm import ops


@pytest.mark.parametrize("tokens", (16, 128, 512, 1024))
@pytest.mark.parametrize("implementation", ("minivllm", "torch"))
def test_prefill(
    measure: Measure, model: Model, device: str, dtype: torch.dtype, tokens: int, implementation: str
) -> None:
    q = torch.randn(tokens, model.num_heads, model.head_dim, device=device, dtype=dtype)
    k, v = torch.randn(2, tokens, model.num_kv_heads, model.head_dim, device=device, dtype=dtype)
    lengths = torch.tensor([0, tokens], device=device, dtype=torch.int32)
    scale = model.head_dim**-0.5
    # [batch, heads, tokens, head_dim], as PyTorch wants them
    torch_q, torch_k, torch_v = (x.transpose(0, 1).contiguous().unsqueeze(0) for x in (q, k, v))
    gigaflops = 4 * model.num_heads * model.head_dim * tokens * (tokens + 1) / 2 / 1e9
    if implementation == "minivllm":
        measure(
            lambda: ops.flash_attention(q, k, v, lengths, lengths, tokens, tokens, scale=scale), gigaflops=gigaflops
        )
    else:
        attend = functional.scaled_dot_product_attention
        measure(lambda: attend(torch_q, torch_k, torch_v, is_causal=True, enable_gqa=True), gigaflops=gigaflops)
