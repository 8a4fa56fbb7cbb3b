"""silu_and_mul against torch.nn.functional.silu and a product."""

from __future__ import annotations

import pytest
import torch
from conftest import Measure, Model
from torch.nn import functional

from minivllm import ops


@pytest.mark.parametrize("rows", (1, 64, 1024))
@pytest.mark.parametrize("implementation", ("minivllm", "torch"))
def test_silu_and_mul(
    measure: Measure, model: Model, device: str, dtype: torch.dtype, rows: int, implementation: str
) -> None:
    d = model.intermediate
    x = torch.randn(rows, 2 * d, device=device, dtype=dtype)
    call = (lambda: functional.silu(x[:, :d]) * x[:, d:]) if implementation == "torch" else lambda: ops.silu_and_mul(x)
    measure(call, gigabytes=1.5 * x.nbytes / 1e9)
