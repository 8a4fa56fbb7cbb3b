"""rms_norm and fused_add_rms_norm against torch.nn.functional.rms_norm."""

from __future__ import annotations

import pytest
import torch
from conftest import Measure, Model
from torch.nn import functional

from minivllm import ops

EPS = 1e-6


@pytest.mark.parametrize("rows", (1, 64, 1024))
@pytest.mark.parametrize("implementation", ("minivllm", "torch"))
def test_rms_norm(
    measure: Measure, model: Model, device: str, dtype: torch.dtype, rows: int, implementation: str
) -> None:
    x = torch.randn(rows, model.hidden, device=device, dtype=dtype)
    weight = torch.randn(model.hidden, device=device, dtype=dtype)
    gigabytes = 2 * x.nbytes / 1e9
    if implementation == "minivllm":
        measure(lambda: ops.rms_norm(x, weight, EPS), gigabytes=gigabytes)
    else:
        measure(lambda: functional.rms_norm(x, (model.hidden,), weight, EPS), gigabytes=gigabytes)


@pytest.mark.parametrize("rows", (1, 64, 1024))
@pytest.mark.parametrize("implementation", ("minivllm", "torch"))
def test_fused_add_rms_norm(
    measure: Measure, model: Model, device: str, dtype: torch.dtype, rows: int, implementation: str
) -> None:
    # The input is the output of the call before, so the residual stays in range only if it is small.
    x = torch.randn(rows, model.hidden, device=device, dtype=dtype)
    residual = torch.randn(rows, model.hidden, device=device, dtype=dtype)
    weight = torch.zeros(model.hidden, device=device, dtype=dtype)

    def in_torch() -> None:
        residual.add_(x)
        x.copy_(functional.rms_norm(residual, (model.hidden,), weight, EPS))

    call = in_torch if implementation == "torch" else lambda: ops.fused_add_rms_norm(x, residual, weight, EPS)
    measure(call, gigabytes=4 * x.nbytes / 1e9)
