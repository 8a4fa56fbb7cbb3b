"""token_logprobs against log_softmax in float32, gather, a comparison for the ranks, and topk.

PyTorch's topk promises no order among equals; ours does. GB/s counts one reading of the logits.
"""

from __future__ import annotations

from cases import VOCAB, Case, cases
from conftest import Measure
from timing import Call
from torch import Tensor

from minivllm import ops


def usual_way(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, ...]:
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1))
    ranks = 1 + (logprobs > chosen).sum(-1)
    return chosen.squeeze(1), ranks, *logprobs.topk(num_top)


@cases(
    "token_logprobs",
    "minivllm torch",
    "rows vocab top",
    cpu=[(rows, vocab, top) for vocab in (4096, VOCAB) for rows in (1, 16) for top in (0, 20)],
    cuda=[(rows, VOCAB, top) for top in (0, 20) for rows in (1, 64, 256)],
)
def test_token_logprobs(measure: Measure, case: Case) -> None:
    rows, vocab, num_top = case.sizes

    def make() -> Call:
        logits = 3 * case.randn(rows, vocab)
        token_ids = logits.argmax(-1)
        way = usual_way if case.way == "torch" else ops.token_logprobs
        return lambda: way(logits, token_ids, num_top)

    measure(case, make, gigabytes=rows * vocab * case.dtype.itemsize / 1e9, limit="read")
