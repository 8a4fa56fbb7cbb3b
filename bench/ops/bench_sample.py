"""Times `ops.sample` against the usual PyTorch ways: argmax, softmax + multinomial, and a sort before both.

    pytest bench/ops/bench_sample.py -o addopts= --benchmark-columns=min,median --benchmark-sort=name

On a CPU a busy second core shows as milliseconds of waiting for threads; OMP_NUM_THREADS=1 gives the work alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops

SHAPES = ((1, 4096), (64, 4096), (1, 151_936), (16, 151_936))
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k_50": {"top_k": 50},
    "top_p_0.9": {"top_p": 0.9},
    "min_p_0.05": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}


def options_of_rows(num_rows: int, device: str, options: dict[str, Any]) -> dict[str, Tensor]:
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    rows = {name: torch.full((num_rows,), value, device=device) for name, value in full.items()}
    return rows | {"top_k": rows["top_k"].int(), "seeds": torch.arange(num_rows, device=device)}


def usual_way(logits: Tensor, options: dict[str, Any]) -> Tensor:
    """What PyTorch offers for the same options, the same for every row."""
    if options.get("temperature") == 0.0:
        return logits.argmax(-1)
    probabilities = (logits / options.get("temperature", 1.0)).softmax(-1)
    if not options.keys() - {"temperature"}:
        return torch.multinomial(probabilities, 1).squeeze(1)
    ordered, ids = probabilities.sort(-1, descending=True)
    if "top_k" in options:
        ordered[:, options["top_k"] :] = 0
    if "top_p" in options:
        mass = ordered.cumsum(-1)
        ordered[mass - ordered >= options["top_p"] * mass[:, -1:]] = 0
    if "min_p" in options:
        ordered[ordered < options["min_p"] * ordered[:, :1]] = 0
    return ids.gather(1, torch.multinomial(ordered, 1)).squeeze(1)


def waiting(device: str, call: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("device", ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("way", ("minivllm", "torch"))
def test_sample(benchmark: Any, device: str, shape: tuple[int, int], name: str, way: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(device)
    options = options_of_rows(shape[0], device, OPTIONS[name])
    benchmark.group = f"{device} {shape} {name}"
    if way == "minivllm":
        benchmark(waiting(device, lambda: ops.sample(logits, **options)))
    else:
        benchmark(waiting(device, lambda: usual_way(logits, OPTIONS[name])))
