"""paged_attention of decode rows against scaled_dot_product_attention.

PyTorch gets its best case: sequences of one length, keys and values contiguous for each head, no block table.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Measure, Model
from torch.nn import functional

from minivllm import ops

BLOCK_SIZE = 16


@pytest.mark.parametrize("context", (64, 256, 1024))
@pytest.mark.parametrize("rows", (1, 64))
@pytest.mark.parametrize("implementation", ("minivllm", "torch"))
def test_decode(
    measure: Measure, model: Model, device: str, dtype: torch.dtype, rows: int, context: int, implementation: str
) -> None:
    blocks = context // BLOCK_SIZE
    q = torch.randn(rows, model.num_heads, model.head_dim, device=device, dtype=dtype)
    shape = (2, rows * blocks, model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    k_cache, v_cache = torch.randn(shape, device=device, dtype=dtype)
    tables = torch.randperm(rows * blocks, device=device).to(torch.int32).view(rows, blocks)
    seq_lens = torch.full((rows,), context, device=device, dtype=torch.int32)
    lengths = torch.arange(rows + 1, device=device, dtype=torch.int32)
    scale = model.head_dim**-0.5
    gigabytes = (k_cache.nbytes + v_cache.nbytes) / 1e9
    if implementation == "minivllm":
        call = ops.paged_attention
        measure(lambda: call(q, k_cache, v_cache, tables, seq_lens, lengths, 1, scale=scale), gigabytes=gigabytes)
    else:
        k, v = torch.randn(2, rows, model.num_kv_heads, context, model.head_dim, device=device, dtype=dtype)
        one = q.unsqueeze(2)  # [rows, num_heads, 1, head_dim]
        attend = functional.scaled_dot_product_attention
        measure(lambda: attend(one, k, v, enable_gqa=True), gigabytes=gigabytes)
