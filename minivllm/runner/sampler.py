"""Draws one token for each row that needs one; the drawing itself is the op `minivllm.ops.sample`."""

from __future__ import annotations

from torch import Tensor

from minivllm.ops import sample
from minivllm.runner.forward_batch import SamplingBatch


def draw(logits: Tensor, rows: SamplingBatch) -> Tensor:
    """logits: [S, vocab_size] -> ids [S] int64; -1 where a row's logits are not numbers."""
    return sample(
        logits,
        temperature=rows.temperature,
        top_k=rows.top_k,
        top_p=rows.top_p,
        min_p=rows.min_p,
        seeds=rows.seeds,
    )
