"""Seconds from process start to the first token, cold (kernels compiled first) and warm, each in a fresh process.

    python bench/startup.py [--model FOLDER] [--device cpu]

Cold uses an empty kernel cache in a temporary folder; warm uses that cache again. Stages are printed as the process
reports them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

import click
from rich.console import Console
from rich.table import Table

# Runs in the child: prints seconds since the parent started it, at each stage.
CHILD = """
import sys, time
start, model, device = float(sys.argv[1]), sys.argv[2] or None, sys.argv[3]
def stage(name): print(name, time.time() - start, flush=True)
stage("python")
import torch; stage("import torch")
import minivllm.ops; stage("kernels")
from minivllm import LLM, SamplingParams; stage("import minivllm")
with LLM(model, device=device) as llm:
    stage("model")
    for delta in llm.stream("Once upon a time", SamplingParams(max_tokens=2, ignore_eos=True)):
        stage("first token"); break
"""
STAGES = ("python", "import torch", "kernels", "import minivllm", "model", "first token")


def measure(model: str, device: str, cache: str) -> dict[str, float]:
    environment = {**os.environ, "MINIVLLM_CACHE_DIR": cache}
    command = [sys.executable, "-c", CHILD, repr(time.time()), model, device]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in out.splitlines()}


@click.command()
@click.option("--model", default="", help="Model folder.  [default: the bundled model]")
@click.option("--device", default="auto", show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Warm starts; the median counts.")
def main(model: str, device: str, repeats: int) -> None:
    """Print when each stage of the start was reached, in seconds since the process was started."""
    with tempfile.TemporaryDirectory() as cache:
        cold = measure(model, device, cache)
        warm = [measure(model, device, cache) for _ in range(repeats)]
    table = Table("stage reached", "cold, s", "warm, s", title=f"process start to first token, device {device}")
    for stage in STAGES:
        table.add_row(stage, f"{cold[stage]:.2f}", f"{statistics.median(run[stage] for run in warm):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
