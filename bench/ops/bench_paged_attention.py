"""paged_attention of decode rows, one query each over a context of permuted blocks, against PyTorch and FlashInfer.

PyTorch gets its best case: keys and values contiguous for each sequence and head, no block table. FlashInfer runs its
CUDA-core and its tensor-core kernel. GB/s counts the keys and values read.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from cases import BLOCK_SIZE, CPU_MODELS, LARGE, SMALL, Case, cases
from conftest import Measure
from peers import flashinfer, workspace
from timing import Call
from torch import Tensor
from torch.nn import functional

from minivllm import ops

ROWS_AND_CONTEXTS = (
    *((1, 1024), (1, 8192), (1, 65_536), (16, 1024), (16, 8192)),
    *((64, 1024), (64, 8192), (256, 1024), (256, 4096)),
)


@cache
def planned(cores: str, rows: int, context: int, num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
    """Block i of the caches is page i of the sequences in a row, permuted as ours are."""
    blocks = context // BLOCK_SIZE
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace(), "HND", use_tensor_cores=cores == "tensor")
    indptr = torch.arange(rows + 1, dtype=torch.int32) * blocks
    pages = torch.randperm(rows * blocks, device="cuda").int()
    last = torch.full((rows,), BLOCK_SIZE, dtype=torch.int32)
    types = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(indptr, pages, last, num_heads, num_kv_heads, head_dim, BLOCK_SIZE, **types)
    return wrapper


def one_query_each(rows: int, device: torch.device | str) -> Tensor:
    return torch.arange(rows + 1, device=device, dtype=torch.int32)


def our_plan(
    seq_lens: Tensor, lengths: Tensor, context: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> Tensor:
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    return ops.plan_paged_attention(seq_lens, lengths, 1, max_seqlen_k=context, **shape)


def ours(q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, seq_lens: Tensor) -> Call:
    """With the plan of a step made beforehand, as FlashInfer's is: all layers share one."""
    lengths = one_query_each(len(q), q.device)
    scale, context = q.shape[-1] ** -0.5, tables.shape[1] * BLOCK_SIZE
    plan = our_plan(seq_lens, lengths, context, q.shape[1], k_cache.shape[1], q.shape[2])
    return lambda: ops.paged_attention(q, k_cache, v_cache, tables, seq_lens, lengths, 1, scale=scale, plan=plan)


@cases(
    "paged_attention",
    "minivllm torch flashinfer,cuda flashinfer,tensor",
    "rows context heads kv_heads head_dim",
    cpu=[
        (rows, context, m.num_heads, m.num_kv_heads, m.head_dim)
        for m in CPU_MODELS
        for context in (64, 256, 1024)
        for rows in (1, 64)
    ],
    cuda=[(*pair, m.num_heads, m.num_kv_heads, m.head_dim) for m in (SMALL, LARGE) for pair in ROWS_AND_CONTEXTS],
)
def test_decode(measure: Measure, case: Case) -> None:
    rows, context, num_heads, num_kv_heads, head_dim = case.sizes
    blocks = context // BLOCK_SIZE

    def make() -> Call:
        q = case.randn(rows, num_heads, head_dim)
        if case.way == "torch":
            k, v = case.randn(2, rows, num_kv_heads, context, head_dim)
            one = q.unsqueeze(2)  # [rows, num_heads, 1, head_dim]
            return lambda: functional.scaled_dot_product_attention(one, k, v, enable_gqa=True)
        k_cache, v_cache = case.randn(2, rows * blocks, num_kv_heads, BLOCK_SIZE, head_dim)
        if case.way.startswith("flashinfer"):
            wrapper = planned(case.way.partition(",")[2], *case.sizes)
            return lambda: wrapper.run(q, (k_cache, v_cache))
        tables = torch.randperm(rows * blocks, device=case.device).int().view(rows, blocks)
        return ours(q, k_cache, v_cache, tables, case.ints([context] * rows))

    moved = 2 * rows * context * num_kv_heads * head_dim * case.dtype.itemsize
    measure(case, make, gigabytes=moved / 1e9, limit="read", cold=True)


@cases(
    "plan_paged_attention",
    "minivllm",
    "rows context heads kv_heads head_dim",
    cuda=[(*pair, LARGE.num_heads, LARGE.num_kv_heads, LARGE.head_dim) for pair in ((1, 65_536), (256, 4096))],
)
def test_plan(measure: Measure, case: Case) -> None:
    rows, context, num_heads, num_kv_heads, head_dim = case.sizes

    def make() -> Call:
        seq_lens = torch.randint(1, context + 1, (rows,), device=case.device, dtype=torch.int32)
        lengths = one_query_each(rows, case.device)
        return lambda: our_plan(seq_lens, lengths, context, num_heads, num_kv_heads, head_dim)

    measure(case, make)
