"""packed_linear against torch.nn.functional.linear in float32 on the CPU: qkv-sized, gate_up-sized and head-sized
products."""

from __future__ import annotations

import torch
from cases import SMALL, Case, cases
from conftest import Measure
from timing import Call

from minivllm import ops

# The bundled model's gate_up, down and head, and Qwen3-0.6B's gate_up.
PRODUCTS = ((1536, 256), (256, 768), (4096, 256), (2 * SMALL.intermediate, SMALL.hidden))


@cases(
    "packed_linear",
    "minivllm minivllm,float32 torch",
    "rows out in",
    cpu=[(rows, *product) for product in PRODUCTS for rows in (1, 16, 64, 256)],
    cpu_dtypes=(torch.float32,),
)
def test_packed_linear(measure: Measure, case: Case) -> None:
    rows, out_features, in_features = case.sizes

    def make() -> Call:
        x, weight = case.randn(rows, in_features), case.randn(out_features, in_features)
        if case.way == "torch":
            return lambda: torch.nn.functional.linear(x, weight)
        if case.way == "minivllm":  # weights that came from bfloat16 are packed as bfloat16
            weight = weight.bfloat16().float()
        packed = ops.pack_linear_weight(weight)
        return lambda: ops.packed_linear(x, packed, out_features)

    measure(case, make, gigaflops=2e-9 * rows * out_features * in_features)
