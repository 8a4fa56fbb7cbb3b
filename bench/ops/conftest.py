"""Fixtures of the op benchmarks: models, devices, dtypes, and `measure`, which times one call and notes its rate.

`pytest bench/ops --benchmark-only` runs them. Each group holds one op at one shape, ours beside the PyTorch way. On a
CPU the time is that of a call; on a GPU pytest-benchmark's time includes a synchronisation, so the rate uses CUDA
events instead.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Model:
    """The shapes that ops see in one layer of a model."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


MODELS = {"tiny": Model(256, 768, 4, 2, 64), "qwen3-0.6b": Model(1024, 3072, 16, 8, 128)}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
Measure = Callable[..., None]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=("float32", "bfloat16"))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = getattr(torch, request.param)
    return found


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]


def event_seconds(call: Callable[[], Any], repeats: int = 30) -> float:
    """Median time of a call on the GPU."""
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    """measure(call, gigabytes=..., gigaflops=...): what the call must move and compute at least."""

    def run(call: Callable[[], Any], *, gigabytes: float = 0.0, gigaflops: float = 0.0) -> None:
        on_gpu = request.getfixturevalue("device") == "cuda"
        parameters = [part for part in request.node.callspec.id.split("-") if part not in ("minivllm", "torch")]
        benchmark.group = f"{request.node.originalname.removeprefix('test_')} {' '.join(parameters)}"

        def call_and_wait() -> None:
            call()
            torch.cuda.synchronize()

        with torch.inference_mode():
            call()
            benchmark(call_and_wait if on_gpu else call)
            seconds = event_seconds(call) if on_gpu else benchmark.stats.stats.median
        if gigabytes:
            benchmark.extra_info["GB/s"] = round(gigabytes / seconds, 1)
        if gigaflops:
            benchmark.extra_info["GFLOP/s"] = round(gigaflops / seconds, 1)

    return run
