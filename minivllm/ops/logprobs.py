"""Log-probabilities of given tokens, their ranks, and the likeliest tokens beside them.

All that a row needs is its largest logit, the sum of exp(logit - largest) and its few largest logits; the softmax of a
whole row is never asked for, so a kernel reads the logits once and writes next to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check, check_ids
from minivllm.ops._register import define

_LARGEST = torch.finfo(torch.float32).max
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _check_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Check:
    check = Check("token_logprobs", logits.device)
    check.tensor("logits", logits, "n vocab", FLOATS)
    check.tensor("token_ids", token_ids, "n", (torch.int64,))
    vocab = logits.shape[1]
    if not 0 <= num_top <= vocab:
        check.fail(f"num_top is {num_top}, expected 0 to {vocab} (vocab)")
    return check


def _empty(logits: Tensor, num_top: int) -> Four:
    n = logits.shape[0]
    return (
        logits.new_empty(n, dtype=torch.float32),
        logits.new_empty(n, dtype=torch.int64),
        logits.new_empty(n, num_top, dtype=torch.int64),
        logits.new_empty(n, num_top, dtype=torch.float32),
    )


def _likeliest(logits: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """The num_top largest logits of each row and their ids, the lower id first of equals."""
    if num_top == 0:
        return logits[:, :0].contiguous(), logits[:, :0].long().contiguous()
    ordered, ids = logits.sort(stable=True, dim=-1, descending=True)
    return ordered[:, :num_top].contiguous(), ids[:, :num_top].contiguous()


def token_logprobs_reference(logits: Tensor, token_ids: Tensor, num_top: int) -> Four:
    """The op's meaning in plain PyTorch; it never waits for the device."""
    check = _check_logprobs(logits, token_ids, num_top)
    check_ids(check, "token_ids", token_ids, logits.shape[1], lowest=None)
    if logits.shape[1] == 0:
        logprobs, ranks, top_ids, top_logprobs = _empty(logits, num_top)
        return logprobs.fill_(torch.nan), ranks.fill_(0), top_ids, top_logprobs
    wide = logits.float() + 0.0  # makes 0 of -0, so that a sort by their bits sees equals
    largest = wide.amax(-1, keepdim=True)  # NaN where the row has one
    valid = largest.abs() <= _LARGEST
    # A sum in float64 is the same in float32 whatever its order, which on a GPU depends on the number of rows.
    log_mass = (wide - largest).exp().sum(-1, keepdim=True, dtype=torch.float64).log()
    chosen = wide.gather(1, token_ids.clamp(min=0).unsqueeze(1))
    known = valid & (token_ids >= 0).unsqueeze(1)
    logprobs = ((chosen - largest) - log_mass).float().masked_fill(~known, torch.nan)
    ranks = (1 + (wide > chosen).sum(-1, keepdim=True)).masked_fill(~known, 0)
    top_logits, top_ids = _likeliest(wide, num_top)
    top_logprobs = ((top_logits - largest) - log_mass).float().masked_fill(~valid, torch.nan)
    return logprobs.squeeze(1), ranks.squeeze(1), top_ids.masked_fill(~valid, -1), top_logprobs


def _logprobs_fake(logits: Tensor, token_ids: Tensor, num_top: int) -> Four:
    _check_logprobs(logits, token_ids, num_top)
    return _empty(logits, num_top)


_token_logprobs = define(
    "token_logprobs",
    "(Tensor logits, Tensor token_ids, int num_top) -> (Tensor, Tensor, Tensor, Tensor)",
    token_logprobs_reference,
    _logprobs_fake,
)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> Four:
    """Natural logarithms of probabilities under softmax(logits): of one given token a row, and of the likeliest ones.

    Args:
        logits: [n, vocab] float32, bfloat16 or float16; last dimension contiguous. -infinity is allowed and stands
            for probability 0.
        token_ids: [n] int64, less than vocab; a negative one asks for nothing.
        num_top: how many of the likeliest tokens are wanted for each row, 0 to vocab.

    Returns:
        logprobs: [n] float32, log_softmax of the row at its token; exponentials in float32, their sum in float64.
        ranks: [n] int64, 1 + the number of tokens with a strictly larger logit.
        top_ids: [n, num_top] int64, likeliest first; of equal logits the lower id first.
        top_logprobs: [n, num_top] float32, their logprobs.

        Where the token id is negative, logprob is NaN and rank 0. Rows with NaN or +infinity, or without a finite
        logit, have no probabilities: logprob and top_logprobs are NaN, rank is 0 and top_ids are -1.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides, or num_top outside its range; on the CPU also a token id
            >= vocab (on CUDA such an id is undefined behaviour, because to look at it would stall the GPU).
    """
    out: Four = _token_logprobs(logits, token_ids, num_top)
    return out
