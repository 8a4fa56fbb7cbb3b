"""apply_penalties against the dense PyTorch formula, and count_tokens against index_put_ with accumulation.

Every row has 1,000 tokens in its counts, half of them generated. GB/s counts what must be read: the counts alone, since
few logits are touched.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Measure
from torch import Tensor

from minivllm import ops

SHAPES = ((1, 4096), (64, 4096), (1, 151_936), (16, 151_936))
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
implementations = pytest.mark.parametrize("implementation", ("minivllm", "torch"))


def table(rows: int, vocab: int, device: str) -> Tensor:
    counts = torch.zeros(rows, vocab, dtype=torch.int32)
    tokens = torch.rand(rows, vocab).argsort(-1)[:, :1000]
    counts.scatter_(1, tokens[:, :500], 1).scatter_(1, tokens[:, 500:], 2)
    return counts.to(device)


@shapes
@implementations
def test_apply_penalties(
    measure: Measure, device: str, dtype: torch.dtype, shape: tuple[int, int], implementation: str
) -> None:
    logits, counts = torch.randn(shape, device=device, dtype=dtype), table(*shape, device)
    rows = torch.arange(shape[0], device=device)
    presence, frequency = torch.zeros(2, shape[0], device=device)  # so that repeated calls leave the logits as they are
    repetition = torch.ones(shape[0], device=device)

    def in_torch() -> None:
        generated, seen = counts >> 1, counts != 0
        factor = torch.where(seen, repetition[:, None], 1)
        logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
        logits.sub_(frequency[:, None] * generated + presence[:, None] * (generated > 0))

    def ours() -> None:
        ops.apply_penalties(logits, rows, counts, rows, presence, frequency, repetition)

    measure(in_torch if implementation == "torch" else ours, gigabytes=counts.nbytes / 1e9)


@shapes
@implementations
def test_count_tokens(measure: Measure, device: str, shape: tuple[int, int], implementation: str) -> None:
    counts = torch.zeros(shape, dtype=torch.int32, device=device)
    rows, tokens = torch.arange(shape[0], device=device), torch.randint(shape[1], (shape[0],), device=device)

    def in_torch() -> None:
        added = 2 * (tokens >= 0).int()
        counts.index_put_((rows, tokens.clamp(min=0)), added, accumulate=True)

    measure(in_torch if implementation == "torch" else lambda: ops.count_tokens(counts, rows, tokens))
