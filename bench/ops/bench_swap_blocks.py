"""swap_blocks between a GPU's cache and pinned host memory, both ways, against one contiguous copy of as many bytes.

The copy is the bus at its best. On a CPU both caches are ordinary memory.

GB/s counts each byte once, as the bus moves it.
"""

from __future__ import annotations

import torch
from cases import BLOCK_SIZE, SMALL, Case, cases
from conftest import Measure
from timing import Call

from minivllm import ops

BLOCKS = (16, 1024)


@cases(
    "swap_blocks",
    "minivllm torch",
    "blocks direction",
    cpu=[(blocks, "within") for blocks in BLOCKS],
    cuda=[(blocks, direction) for blocks in BLOCKS for direction in ("out", "in")],
)
def test_swap_blocks(measure: Measure, case: Case) -> None:
    blocks, direction = case.sizes
    shape = (2 * blocks, SMALL.num_kv_heads, BLOCK_SIZE, SMALL.head_dim)

    def make() -> Call:
        here = case.randn(*shape)
        there = torch.empty(shape, dtype=case.dtype, pin_memory=case.device == "cuda").copy_(here)
        source, target = (there, here) if direction == "in" else (here, there)
        source_ids, target_ids = torch.randperm(2 * blocks, device=case.device).view(2, blocks)
        if case.way == "torch":
            return lambda: target[:blocks].copy_(source[:blocks], non_blocking=True)
        return lambda: ops.swap_blocks(source, target, source_ids, target_ids)

    block_bytes = SMALL.num_kv_heads * BLOCK_SIZE * SMALL.head_dim * case.dtype.itemsize
    measure(case, make, gigabytes=blocks * block_bytes / 1e9, limit="bus", cold=True)
