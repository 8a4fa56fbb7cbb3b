"""copy_blocks against an indexed read and an indexed assignment for each cache."""

from __future__ import annotations

import pytest
import torch
from conftest import Measure, Model

from minivllm import ops

BLOCK_SIZE = 16


@pytest.mark.parametrize("pairs", (1, 16, 128))
@pytest.mark.parametrize("implementation", ("minivllm", "torch"))
def test_copy_blocks(
    measure: Measure, model: Model, device: str, dtype: torch.dtype, pairs: int, implementation: str
) -> None:
    shape = (2, 512, model.num_kv_heads, BLOCK_SIZE, model.head_dim)
    k_cache, v_cache = torch.zeros(shape, device=device, dtype=dtype)
    sources, targets = torch.randperm(512, device=device)[: 2 * pairs].view(2, pairs)

    def in_torch() -> None:
        k_cache[targets] = k_cache[sources]
        v_cache[targets] = v_cache[sources]

    call = in_torch if implementation == "torch" else lambda: ops.copy_blocks(k_cache, v_cache, sources, targets)
    measure(call, gigabytes=4 * pairs * k_cache[0].nbytes / 1e9)
