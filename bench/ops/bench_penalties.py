"""apply_penalties against the dense PyTorch formula, and count_tokens against index_put_ with accumulation.

Every row has 1,000 tokens in its counts, half of them generated. GB/s counts what must be read: the counts alone, since
few logits are touched.
"""

from __future__ import annotations

import torch
from cases import VOCAB, Case, cases
from conftest import Measure
from timing import Call
from torch import Tensor

from minivllm import ops

SEEN = 1000
CPU = [(rows, vocab) for vocab in (4096, VOCAB) for rows in (1, 16)]
CUDA = [(rows, VOCAB) for rows in (1, 64, 256)]


def table(rows: int, vocab: int, device: str) -> Tensor:
    counts = torch.zeros(rows, vocab, dtype=torch.int32, device=device)
    tokens = torch.randint(0, vocab, (rows, SEEN), device=device)
    counts.scatter_(1, tokens[:, : SEEN // 2], 1).scatter_(1, tokens[:, SEEN // 2 :], 2)
    return counts


@cases("apply_penalties", "minivllm torch", "rows vocab", cpu=CPU, cuda=CUDA)
def test_apply_penalties(measure: Measure, case: Case) -> None:
    num_rows, vocab = case.sizes

    def make() -> Call:
        logits, counts = case.randn(num_rows, vocab), table(num_rows, vocab, case.device)
        rows = torch.arange(num_rows, device=case.device)
        presence, frequency = torch.zeros(
            2, num_rows, device=case.device
        )  # repeated calls leave the logits as they are
        repetition = torch.ones(num_rows, device=case.device)

        def in_torch() -> None:
            generated, seen = counts >> 1, counts != 0
            factor = torch.where(seen, repetition[:, None], 1)
            logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
            logits.sub_(frequency[:, None] * generated + presence[:, None] * (generated > 0))

        def fused() -> None:
            ops.apply_penalties(logits, rows, counts, rows, presence, frequency, repetition)

        return in_torch if case.way == "torch" else fused

    measure(case, make, gigabytes=4 * num_rows * vocab / 1e9, limit="read", cold=True)


@cases("count_tokens", "minivllm torch", "rows vocab", cpu=CPU, cuda=CUDA, cpu_dtypes=(torch.float32,))
def test_count_tokens(measure: Measure, case: Case) -> None:
    num_rows, vocab = case.sizes

    def make() -> Call:
        counts = torch.zeros(num_rows, vocab, dtype=torch.int32, device=case.device)
        rows = torch.arange(num_rows, device=case.device)
        tokens = torch.randint(vocab, (num_rows,), device=case.device)

        def in_torch() -> None:
            added = 2 * (tokens >= 0).int()
            counts.index_put_((rows, tokens.clamp(min=0)), added, accumulate=True)

        return in_torch if case.way == "torch" else lambda: ops.count_tokens(counts, rows, tokens)

    measure(case, make)
