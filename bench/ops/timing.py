"""How a call on a GPU is timed, and what the GPU itself can do: the limits that rates are compared with.

Many calls are captured into one CUDA graph, so neither Python nor launch latency counts; the time of a call is the
replay's share. The calls rotate over sets of arguments that together exceed the L2 cache, unless one call touches
little memory: what a kernel has just written is then still in that cache in a model, too. A call that cannot be
captured (a peer that looks at the device from the host) is timed between two events instead.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn import functional

Call = Callable[[], Any]

ROTATED_BYTES = 200e6  # over three times the L2 cache of an H200
MAX_SETS = 64
HOT_BYTES = 8e6  # a call that touches less finds its arguments in the L2 cache
HOT_SETS = 4
GRAPH_SECONDS = 1.5e-3  # long enough that the start of a replay does not count
MAX_CALLS = 400
SAMPLE_SECONDS = 0.05  # of replays for each figure
SLEEP_CYCLES = 200_000  # keeps the GPU busy while the host submits what is timed: some 0.1 ms

_clock = [0.0]


def gpu_clock() -> float:
    """pytest-benchmark's timer for calls on a GPU: it advances by the seconds that `GpuTimer.tick` measured."""
    return _clock[0]


def between_events(call: Call) -> float:
    """Seconds of what `call` submits, on the GPU's own clock."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


class GpuTimer:
    """Times one call over sets of arguments that `make` draws; it touches `gigabytes`, from memory however small where
    `cold` is set."""

    def __init__(self, make: Callable[[], Call], gigabytes: float, cold: bool) -> None:
        touched = max(gigabytes * 1e9, 1)
        sets = min(MAX_SETS, math.ceil(ROTATED_BYTES / touched)) if cold or touched >= HOT_BYTES else HOT_SETS
        self.calls = [make() for _ in range(sets)]
        self._kept: list[Any] = [None] * sets  # a result lives until its set is used again, so outputs rotate as well
        for call in self.calls[:2]:
            call()
        once = min(between_events(self.calls[0]) for _ in range(3))
        repeats = min(MAX_CALLS, math.ceil(GRAPH_SECONDS / once))
        self.calls_a_tick = sets * max(1, round(repeats / sets))
        self.captured = self._capture()
        self.rounds = max(5, min(50, round(SAMPLE_SECONDS / (once * self.calls_a_tick))))

    def _run_all(self) -> None:
        for i in range(self.calls_a_tick):
            self._kept[i % len(self.calls)] = self.calls[i % len(self.calls)]()

    def _capture(self) -> bool:
        self._run = self._run_all
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph):
                self._run_all()
        except RuntimeError:
            torch.cuda.synchronize()
            return False
        self._run = graph.replay
        graph.replay()
        return True

    def tick(self) -> None:
        """One sample: `gpu_clock` advances by the seconds of one call."""
        _clock[0] += between_events(self._run) / self.calls_a_tick


@dataclass(frozen=True)
class Limits:
    """What this GPU does at best, measured in this process."""

    read: float  # GB/s over 4 GiB: the best of a sum, a matrix-vector product and a decode attention
    copy: float  # GB/s, read and written, of a copy of 4 GiB
    matmul: float  # GFLOP/s of a sustained bfloat16 product of 8192 x 8192 matrices
    bus: float  # GB/s of a copy of 128 MiB from pinned host memory


@cache
def limits() -> Limits:
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.randn(1 << 18, 8192, device="cuda", dtype=torch.bfloat16)
    k, v = matrix.view(2, 64, 8, 16_384, 128)
    q = torch.randn(64, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    pinned = torch.ones(1 << 25, pin_memory=True)

    def median(call: Call, count: int) -> float:
        call()
        return statistics.median(between_events(call) for _ in range(count))

    readers: tuple[Call, ...] = (
        source.sum,
        lambda: matrix @ a[0],
        lambda: functional.scaled_dot_product_attention(q, k, v),
    )
    return Limits(
        read=source.nbytes / min(median(reader, 15) for reader in readers) / 1e9,
        copy=2 * source.nbytes / median(lambda: target.copy_(source), 15) / 1e9,
        matmul=2 * 8192**3 / median(lambda: a @ b, 200) / 1e9,
        bus=pinned.nbytes / median(lambda: target[: len(pinned)].copy_(pinned, non_blocking=True), 10) / 1e9,
    )
