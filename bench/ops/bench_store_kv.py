"""store_kv against two indexed assignments with the block and offset of each token given."""

from __future__ import annotations

import pytest
import torch
from conftest import Measure, Model

from minivllm import ops

BLOCK_SIZE = 16


@pytest.mark.parametrize("rows", (1, 64, 1024))
@pytest.mark.parametrize("implementation", ("minivllm", "torch"))
def test_store_kv(
    measure: Measure, model: Model, device: str, dtype: torch.dtype, rows: int, implementation: str
) -> None:
    k, v = torch.randn(2, rows, model.num_kv_heads, model.head_dim, device=device, dtype=dtype)
    shape = (2, 256, model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    k_cache, v_cache = torch.zeros(shape, device=device, dtype=dtype)
    slots = torch.randperm(256 * BLOCK_SIZE, device=device)[:rows]
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE

    def in_torch() -> None:
        k_cache[block, :, offset] = k
        v_cache[block, :, offset] = v

    call = in_torch if implementation == "torch" else lambda: ops.store_kv(k, v, k_cache, v_cache, slots)
    measure(call, gigabytes=4 * k.nbytes / 1e9)
