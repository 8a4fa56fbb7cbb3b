"""token_logprobs against log_softmax in float32, gather, a comparison for the ranks, and topk.

PyTorch's topk promises no order among equals; ours does. GB/s counts one reading of the logits.
"""

from __future__ import annotations

import pytest
import torch
from conftest import Measure
from torch import Tensor

from minivllm import ops

SHAPES = ((1, 4096), (64, 4096), (1, 151_936), (16, 151_936))


def usual_way(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = 1 + (logprobs > chosen).sum(-1)
    return chosen.squeeze(1), ranks, *logprobs.topk(num_top)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("num_top", (0, 20))
@pytest.mark.parametrize("implementation", ("minivllm", "torch"))
def test_token_logprobs(
    measure: Measure, device: str, dtype: torch.dtype, shape: tuple[int, int], num_top: int, implementation: str
) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(device, dtype)
    token_ids = logits.argmax(-1)
    way = usual_way if implementation == "torch" else ops.token_logprobs
    measure(lambda: way(logits, token_ids, num_top), gigabytes=logits.nbytes / 1e9)
