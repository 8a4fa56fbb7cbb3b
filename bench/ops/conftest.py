"""The fixture of the op benchmarks: `measure(case, make, ...)` times one case and notes its rate.

`pytest bench/ops --benchmark-only` runs them all, `-k cuda` those of the GPU. Each group holds one op at one shape:
ours, the PyTorch way, and peers where they are installed. On a CPU the time is that of a call; on a GPU it is the GPU's
own (timing.py). `python bench/kernel_table.py` makes a table of what --benchmark-json wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case
from timing import Call, GpuTimer, gpu_clock, limits

Measure = Callable[..., None]
CPU_SECONDS = 0.25  # for each case; a call that takes longer runs five times


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU cases run on the GPU's clock; a peer's warnings are not ours."""
    for item in items:
        case = item.callspec.params.get("case") if isinstance(item, pytest.Function) else None
        if isinstance(case, Case):
            on_gpu = {"timer": gpu_clock} if case.device == "cuda" else {"max_time": CPU_SECONDS}
            item.add_marker(pytest.mark.benchmark(**on_gpu))
            if not case.way.startswith("minivllm"):
                item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture
def measure(benchmark: Any) -> Measure:
    """measure(case, make, gigabytes=..., gigaflops=..., limit="copy", cold=False).

    `make()` draws one set of arguments and returns the call on them; a GPU case uses several. `gigabytes` and
    `gigaflops` are what the call must move and compute at least, `limit` is "read" where it writes next to nothing,
    `cold` says that the arguments come from memory however small they are (the KV cache).
    """

    def run(
        case: Case,
        make: Callable[[], Call],
        *,
        gigabytes: float = 0.0,
        gigaflops: float = 0.0,
        limit: str = "copy",
        cold: bool = False,
    ) -> None:
        benchmark.group = case.group
        notes = benchmark.extra_info
        notes |= {"op": case.op, "way": case.way, "device": case.device, "dtype": case.dtype_name, "shape": case.shape}
        torch.manual_seed(0)
        with torch.inference_mode():
            if case.device == "cuda":
                timer = GpuTimer(make, gigabytes, cold)
                benchmark.pedantic(timer.tick, rounds=timer.rounds)
                notes["captured"] = timer.captured
            else:
                call = make()
                call()
                benchmark(call)
        seconds = benchmark.stats.stats.median
        notes["us"] = round(seconds * 1e6, 2)
        if gigabytes:
            notes["GB/s"] = round(gigabytes / seconds, 1)
        if gigaflops:
            notes["GFLOP/s"] = round(gigaflops / seconds, 1)
        if case.device == "cuda" and (gigabytes or gigaflops):
            rate, most = (notes["GFLOP/s"], "matmul") if gigaflops else (notes["GB/s"], limit)
            notes["limit"], notes["% of limit"] = most, round(100 * rate / getattr(limits(), most), 1)
            notes["limits"] = {name: round(value) for name, value in vars(limits()).items()}

    return run
