"""What using the op library costs beyond PyTorch itself: microseconds of a call, seconds of an import, seconds of a
build.

    python bench/overhead.py [--build]

A call is timed on a tensor so small that only the way through Python and the dispatcher counts, beside an aten op of
the same tensor. Imports are timed in fresh processes, with the kernels already in the cache; --build also compiles them
into an empty cache.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import timeit

import click
import torch
from rich.console import Console
from rich.table import Table

from minivllm import ops

IMPORT = "import time, torch; start = time.perf_counter(); import minivllm.ops; print(time.perf_counter() - start)"
CALLS = 20_000


def call_microseconds(device: str) -> tuple[float, float]:
    """(ours, aten): best of seven runs each, alternating."""
    x, weight = torch.ones(1, 64, device=device), torch.ones(64, device=device)
    ours, aten = [], []
    for _ in range(7):
        ours.append(timeit.timeit(lambda: ops.rms_norm(x, weight, 1e-6), number=CALLS))
        aten.append(timeit.timeit(lambda: torch.relu(x), number=CALLS))
    return min(ours) / CALLS * 1e6, min(aten) / CALLS * 1e6


def import_seconds(cache: str | None = None) -> float:
    environment = dict(os.environ) if cache is None else {**os.environ, "MINIVLLM_CACHE_DIR": cache}
    command = [sys.executable, "-c", IMPORT]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@click.command()
@click.option("--build", is_flag=True, help="Also compile everything into an empty cache.")
def main(build: bool) -> None:
    """Print calls, imports and builds beside what they are compared with."""
    table = Table("what", "minivllm", "beside", title=f"torch {torch.__version__}, {os.cpu_count()} CPUs")
    with torch.inference_mode():
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            ours, aten = call_microseconds(device)
            table.add_row(f"rms_norm of [1, 64] on {device}", f"{ours:.2f} us", f"torch.relu {aten:.2f} us")
    warm = statistics.median(import_seconds() for _ in range(5))
    table.add_row("import minivllm.ops after torch, warm", f"{warm:.3f} s", "")
    if build:
        with tempfile.TemporaryDirectory() as cache:
            cold = import_seconds(cache)
        table.add_row(f"the same, cold ({ops.build_info().kind} kernels)", f"{cold:.1f} s", "")
    Console().print(table)


if __name__ == "__main__":
    main()
