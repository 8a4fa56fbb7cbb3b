"""silu_and_mul and gelu_and_mul against PyTorch's activation and a product, and FlashInfer."""

from __future__ import annotations

from cases import CPU_MODELS, GPU_BATCHES, Case, cases
from conftest import Measure
from peers import flashinfer
from timing import Call
from torch.nn import functional

from minivllm import ops

WAYS = "minivllm torch flashinfer"
CPU = [(rows, model.intermediate) for model in CPU_MODELS for rows in (1, 64, 1024)]
CUDA = [(rows, model.intermediate) for model, rows in GPU_BATCHES]


@cases("silu_and_mul", WAYS, "rows width", cpu=CPU, cuda=CUDA)
def test_silu_and_mul(measure: Measure, case: Case) -> None:
    rows, width = case.sizes

    def make() -> Call:
        x = case.randn(rows, 2 * width)
        return {
            "minivllm": lambda: ops.silu_and_mul(x),
            "torch": lambda: functional.silu(x[:, :width]) * x[:, width:],
            "flashinfer": lambda: flashinfer.silu_and_mul(x),
        }[case.way]

    measure(case, make, gigabytes=3 * rows * width * case.dtype.itemsize / 1e9)


# Gemma's activation: the tanh form.
@cases("gelu_and_mul", WAYS, "rows width", cpu=CPU[-1:], cuda=CUDA[-2:])
def test_gelu_and_mul(measure: Measure, case: Case) -> None:
    rows, width = case.sizes

    def make() -> Call:
        x = case.randn(rows, 2 * width)
        return {
            "minivllm": lambda: ops.gelu_and_mul(x, approximate="tanh"),
            "torch": lambda: functional.gelu(x[:, :width], approximate="tanh") * x[:, width:],
            "flashinfer": lambda: flashinfer.gelu_tanh_and_mul(x),
        }[case.way]

    measure(case, make, gigabytes=3 * rows * width * case.dtype.itemsize / 1e9)
