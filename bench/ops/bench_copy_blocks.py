"""copy_blocks against an indexed read and an indexed assignment for each cache."""

from __future__ import annotations

import torch
from cases import BLOCK_SIZE, CPU_MODELS, SMALL, Case, cases
from conftest import Measure
from timing import Call

from minivllm import ops

NUM_BLOCKS = 512


@cases(
    "copy_blocks",
    "minivllm torch",
    "pairs kv_heads head_dim",
    cpu=[(pairs, m.num_kv_heads, m.head_dim) for m in CPU_MODELS for pairs in (1, 16, 128)],
    cuda=[(pairs, SMALL.num_kv_heads, SMALL.head_dim) for pairs in (1, 16, 128, 2048)],
)
def test_copy_blocks(measure: Measure, case: Case) -> None:
    pairs, num_kv_heads, head_dim = case.sizes
    num_blocks = max(NUM_BLOCKS, 2 * pairs)

    def make() -> Call:
        k_cache, v_cache = case.randn(2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
        sources, targets = torch.randperm(num_blocks, device=case.device)[: 2 * pairs].view(2, pairs)

        def in_torch() -> None:
            k_cache[targets] = k_cache[sources]
            v_cache[targets] = v_cache[sources]

        return in_torch if case.way == "torch" else lambda: ops.copy_blocks(k_cache, v_cache, sources, targets)

    moved = 4 * pairs * num_kv_heads * BLOCK_SIZE * head_dim * case.dtype.itemsize
    measure(case, make, gigabytes=moved / 1e9, cold=True)
