"""rms_norm and fused_add_rms_norm against torch.nn.functional.rms_norm and FlashInfer."""

from __future__ import annotations

from cases import CPU_MODELS, GPU_BATCHES, Case, cases
from conftest import Measure
from peers import flashinfer
from timing import Call
from torch.nn import functional

from minivllm import ops

EPS = 1e-6
CPU = [(rows, model.hidden) for model in CPU_MODELS for rows in (1, 64, 1024)]
CUDA = [(rows, model.hidden) for model, rows in GPU_BATCHES]


@cases("rms_norm", "minivllm torch flashinfer", "rows hidden", cpu=CPU, cuda=CUDA)
def test_rms_norm(measure: Measure, case: Case) -> None:
    rows, hidden = case.sizes

    def make() -> Call:
        x, weight = case.randn(rows, hidden), case.randn(hidden)
        return {
            "minivllm": lambda: ops.rms_norm(x, weight, EPS),
            "torch": lambda: functional.rms_norm(x, (hidden,), weight, EPS),
            "flashinfer": lambda: flashinfer.rmsnorm(x, weight, EPS),
        }[case.way]

    measure(case, make, gigabytes=2 * rows * hidden * case.dtype.itemsize / 1e9)


@cases("fused_add_rms_norm", "minivllm torch flashinfer", "rows hidden", cpu=CPU, cuda=CUDA)
def test_fused_add_rms_norm(measure: Measure, case: Case) -> None:
    rows, hidden = case.sizes

    def make() -> Call:
        # The input is the output of the call before, so the residual stays in range only if the weight is small.
        x, residual, weight = case.randn(rows, hidden), case.randn(rows, hidden), case.randn(hidden) * 0.01

        def in_torch() -> None:
            residual.add_(x)
            x.copy_(functional.rms_norm(residual, (hidden,), weight, EPS))

        return {
            "minivllm": lambda: ops.fused_add_rms_norm(x, residual, weight, EPS),
            "torch": in_torch,
            "flashinfer": lambda: flashinfer.fused_add_rmsnorm(x, residual, weight, EPS),
        }[case.way]

    measure(case, make, gigabytes=4 * rows * hidden * case.dtype.itemsize / 1e9)
