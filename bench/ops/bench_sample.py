"""sample against the usual PyTorch ways (argmax, the exponential trick, a sort before it) and FlashInfer's softmax and
rejection sampling.

GB/s counts one reading of the logits. On a CPU a busy second core shows as milliseconds of waiting for threads;
OMP_NUM_THREADS=1 gives the work alone.
"""

from __future__ import annotations

from typing import Any

import torch
from cases import VOCAB, Case, cases
from conftest import Measure
from peers import flashinfer
from timing import Call
from torch import Tensor

from minivllm import ops

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k_50": {"top_k": 50},
    "top_p_0.9": {"top_p": 0.9},
    "top_k_50_top_p_0.9": {"top_k": 50, "top_p": 0.9},
    "min_p_0.05": {"min_p": 0.05},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
}
GPU_FILTERS = ("temperature", "top_p_0.9", "top_k_50_top_p_0.9")


def options_of_rows(num_rows: int, device: str, options: dict[str, Any]) -> dict[str, Tensor]:
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    rows = {name: torch.full((num_rows,), value, device=device) for name, value in full.items()}
    return rows | {"top_k": rows["top_k"].int(), "seeds": torch.arange(num_rows, device=device)}


def drawn(weights: Tensor) -> Tensor:
    """A draw in proportion to the weights of each row: the largest of weight / exponential noise."""
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)


def usual_way(logits: Tensor, options: dict[str, Any]) -> Tensor:
    """What PyTorch offers for the same options, the same for every row."""
    if options.get("temperature") == 0.0:
        return logits.argmax(-1)
    probabilities = (logits.float() / options.get("temperature", 1.0)).softmax(-1)
    if not options.keys() - {"temperature"}:
        return drawn(probabilities)
    ordered, ids = probabilities.sort(-1, descending=True)
    if "top_k" in options:
        ordered[:, options["top_k"] :] = 0
    if "top_p" in options:
        mass = ordered.cumsum(-1)
        ordered.masked_fill_(mass - ordered >= options["top_p"] * mass[:, -1:], 0)
    if "min_p" in options:
        ordered.masked_fill_(ordered < options["min_p"] * ordered[:, :1], 0)
    return ids.gather(1, drawn(ordered).unsqueeze(1)).squeeze(1)


def in_flashinfer(logits: Tensor, options: dict[str, Any]) -> Tensor:
    """FlashInfer takes float32 logits; a seed given by us needs no look at the generator from the host."""
    fixed = {"seed": 1, "offset": 0}
    sampling = flashinfer.sampling
    if not options:
        return sampling.sampling_from_logits(logits.float(), **fixed)
    probabilities = sampling.softmax(logits.float())
    if "top_k" in options:
        return sampling.top_k_top_p_sampling_from_probs(probabilities, options["top_k"], options["top_p"], **fixed)
    return sampling.top_p_sampling_from_probs(probabilities, options["top_p"], **fixed)


def run(measure: Measure, case: Case) -> None:
    rows, vocab, name = case.sizes

    def make() -> Call:
        logits = (3 * torch.randn(rows, vocab, device=case.device)).to(case.dtype)
        options = options_of_rows(rows, case.device, OPTIONS[name])
        return {
            "minivllm": lambda: ops.sample(logits, **options),
            "torch": lambda: usual_way(logits, OPTIONS[name]),
            "flashinfer": lambda: in_flashinfer(logits, OPTIONS[name]),
        }[case.way]

    measure(case, make, gigabytes=rows * vocab * case.dtype.itemsize / 1e9, limit="read")


@cases(
    "sample",
    "minivllm torch flashinfer",
    "rows vocab filter",
    cpu=[(rows, vocab, name) for vocab in (4096, VOCAB) for rows in (1, 16) for name in OPTIONS],
    cuda=[(rows, VOCAB, name) for name in GPU_FILTERS for rows in (1, 64, 256)],
    cpu_dtypes=(torch.float32,),
    cuda_dtypes=(torch.float32, torch.bfloat16),
)
def test_sample(measure: Measure, case: Case) -> None:
    run(measure, case)


@cases(
    "sample",
    "minivllm torch",
    "rows vocab filter",
    cuda=[(rows, VOCAB, "greedy") for rows in (1, 64, 256)],
    cuda_dtypes=(torch.float32, torch.bfloat16),
)
def test_greedy(measure: Measure, case: Case) -> None:
    run(measure, case)
