"""merge_attention_states against the formula in PyTorch and FlashInfer (whose logarithms are in base 2)."""

from __future__ import annotations

import torch
from cases import GPU_BATCHES, SMALL, Case, cases
from conftest import Measure
from peers import flashinfer
from timing import Call
from torch import Tensor

from minivllm import ops


@cases(
    "merge_attention_states",
    "minivllm torch flashinfer",
    "rows heads head_dim",
    cpu=[(rows, SMALL.num_heads, SMALL.head_dim) for rows in (1, 64)],
    cuda=[(rows, model.num_heads, model.head_dim) for model, rows in GPU_BATCHES],
)
def test_merge_attention_states(measure: Measure, case: Case) -> None:
    rows, num_heads, head_dim = case.sizes

    def make() -> Call:
        (out_a, out_b), (lse_a, lse_b) = (
            case.randn(2, rows, num_heads, head_dim),
            case.randn(2, rows, num_heads).float(),
        )

        def in_torch() -> tuple[Tensor, Tensor]:
            lse = torch.logaddexp(lse_a, lse_b)
            share_a, share_b = (lse_a - lse).exp(), (lse_b - lse).exp()
            return (out_a * share_a.unsqueeze(-1) + out_b * share_b.unsqueeze(-1)).to(out_a.dtype), lse

        return {
            "minivllm": lambda: ops.merge_attention_states(out_a, lse_a, out_b, lse_b),
            "torch": in_torch,
            "flashinfer": lambda: flashinfer.merge_state(out_a, lse_a, out_b, lse_b),
        }[case.way]

    measure(case, make, gigabytes=3 * rows * num_heads * (head_dim * case.dtype.itemsize + 4) / 1e9)
