"""embedding against torch.nn.functional.embedding, on random rows of Qwen3's vocabulary."""

from __future__ import annotations

import torch
from cases import CPU_MODELS, GPU_BATCHES, VOCAB, Case, cases
from conftest import Measure
from timing import Call
from torch.nn import functional

from minivllm import ops


@cases(
    "embedding",
    "minivllm torch",
    "rows hidden",
    cpu=[(rows, model.hidden) for model in CPU_MODELS for rows in (1, 64, 1024)],
    cuda=[(rows, model.hidden) for model, rows in GPU_BATCHES],
)
def test_embedding(measure: Measure, case: Case) -> None:
    rows, hidden = case.sizes
    weight = case.randn(VOCAB, hidden)

    def make() -> Call:
        token_ids = torch.randint(0, VOCAB, (rows,), device=case.device)
        return {
            "minivllm": lambda: ops.embedding(token_ids, weight),
            "torch": lambda: functional.embedding(token_ids, weight),
        }[case.way]

    measure(case, make, gigabytes=2 * rows * hidden * case.dtype.itemsize / 1e9, cold=True)
