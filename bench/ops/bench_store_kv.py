"""store_kv against two indexed assignments with the block and offset of each token given, and FlashInfer."""

from __future__ import annotations

import torch
from cases import BLOCK_SIZE, CPU_MODELS, SMALL, Case, cases
from conftest import Measure
from peers import flashinfer
from timing import Call

from minivllm import ops


@cases(
    "store_kv",
    "minivllm torch flashinfer",
    "rows kv_heads head_dim",
    cpu=[(rows, m.num_kv_heads, m.head_dim) for m in CPU_MODELS for rows in (1, 64, 1024)],
    cuda=[(rows, SMALL.num_kv_heads, SMALL.head_dim) for rows in (64, 16_384)],
)
def test_store_kv(measure: Measure, case: Case) -> None:
    rows, num_kv_heads, head_dim = case.sizes
    num_blocks = -(-rows // BLOCK_SIZE)

    def make() -> Call:
        k, v = case.randn(2, rows, num_kv_heads, head_dim)
        k_cache, v_cache = case.randn(2, num_blocks, num_kv_heads, BLOCK_SIZE, head_dim)
        blocks = torch.randperm(num_blocks, device=case.device)  # one sequence in permuted blocks
        slots = (blocks.unsqueeze(1) * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=case.device)).flatten()[:rows]
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE

        def in_torch() -> None:
            k_cache[block, :, offset] = k
            v_cache[block, :, offset] = v

        if case.way == "flashinfer":
            batch, positions = case.ints([0] * rows), case.ints(range(rows))
            pages = blocks.int(), case.ints([0, num_blocks]), case.ints([rows - (num_blocks - 1) * BLOCK_SIZE])
            append = flashinfer.append_paged_kv_cache
            return lambda: append(k, v, batch, positions, (k_cache, v_cache), *pages, kv_layout="HND")
        return in_torch if case.way == "torch" else lambda: ops.store_kv(k, v, k_cache, v_cache, slots)

    measure(case, make, gigabytes=4 * rows * num_kv_heads * head_dim * case.dtype.itemsize / 1e9)
