"""packed_linear against torch.nn.functional.linear in float32 on the CPU: qkv-sized, gate_up-sized and head-sized
products."""

from __future__ import annotations

import pytest
import torch
from conftest import MODELS, Measure

from minivllm import ops

PRODUCTS = {
    "tiny gate_up": (1536, 256),
    "tiny down": (256, 768),
    "tiny head": (4096, 256),
    "qwen3-0.6b gate_up": (2 * MODELS["qwen3-0.6b"].intermediate, MODELS["qwen3-0.6b"].hidden),
}


@pytest.fixture(params=("cpu",))
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("rows", (1, 16, 64, 256))
@pytest.mark.parametrize("implementation", ("minivllm", "minivllm, float32 weights", "torch"))
def test_packed_linear(measure: Measure, device: str, product: str, rows: int, implementation: str) -> None:
    out_features, in_features = PRODUCTS[product]
    x, weight = torch.randn(rows, in_features), torch.randn(out_features, in_features)
    if implementation == "minivllm":
        weight = weight.bfloat16().float()
    packed = ops.pack_linear_weight(weight)
    call = (
        (lambda: torch.nn.functional.linear(x, weight))
        if implementation == "torch"
        else lambda: ops.packed_linear(x, packed, out_features)
    )
    measure(call, gigaflops=2e-9 * rows * out_features * in_features)
