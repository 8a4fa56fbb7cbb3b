"""Penalties on tokens that a sequence already holds, and the counts that they are computed from.

A sequence's row of counts has one int32 for each token of the vocabulary: bit 0 says that the prompt holds the token,
and the bits above count how often it was generated. So one table serves all three penalties, a prompt is marked by
setting a bit, and a drawn token adds 2 where it lies, on the device, without the host knowing it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check, check_ids
from minivllm.ops._register import define


def _check_apply(
    logits: Tensor,
    row_indices: Tensor,
    counts: Tensor,
    count_indices: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> Check:
    check = Check("apply_penalties", logits.device)
    check.tensor("logits", logits, "num_rows vocab", FLOATS)
    check.tensor("row_indices", row_indices, "n", (torch.int64,))
    check.tensor("counts", counts, "num_states vocab", (torch.int32,))
    check.tensor("count_indices", count_indices, "n", (torch.int64,))
    check.tensor("presence", presence, "n", (torch.float32,))
    check.tensor("frequency", frequency, "n", (torch.float32,))
    check.tensor("repetition", repetition, "n", (torch.float32,))
    return check


def apply_penalties_reference(
    logits: Tensor,
    row_indices: Tensor,
    counts: Tensor,
    count_indices: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """The op's meaning in plain PyTorch; it never waits for the device."""
    check = _check_apply(logits, row_indices, counts, count_indices, presence, frequency, repetition)
    check_ids(check, "row_indices", row_indices, logits.shape[0])
    check_ids(check, "count_indices", count_indices, counts.shape[0])
    wide, seen = logits[row_indices].float(), counts[count_indices]
    generated = seen >> 1
    factor = torch.where(seen != 0, repetition.unsqueeze(1), 1)
    wide = torch.where(wide > 0, wide / factor, wide * factor)
    wide -= frequency.unsqueeze(1) * generated + presence.unsqueeze(1) * (generated > 0)
    logits[row_indices] = wide.to(logits.dtype)


def _apply_fake(
    logits: Tensor,
    row_indices: Tensor,
    counts: Tensor,
    count_indices: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    _check_apply(logits, row_indices, counts, count_indices, presence, frequency, repetition)


_apply_penalties = define(
    "apply_penalties",
    "(Tensor(a!) logits, Tensor row_indices, Tensor counts, Tensor count_indices, Tensor presence, Tensor frequency, "
    "Tensor repetition) -> ()",
    apply_penalties_reference,
    _apply_fake,
)


def apply_penalties(
    logits: Tensor,
    row_indices: Tensor,
    counts: Tensor,
    count_indices: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> None:
    """In place: repetition, frequency and presence penalties, for some rows of the logits.

    First the repetition penalty r (Keskar et al. 2019, "CTRL", arXiv:1909.05858, in the form that also lowers negative
    logits): a positive logit of a token in the prompt or the output is divided by r, any other multiplied by it. Then
    OpenAI's two: a token that was generated k > 0 times loses frequency * k + presence. In float32, rounded once.

    Args:
        logits: [num_rows, vocab] float32, bfloat16 or float16, written; last dimension contiguous.
        row_indices: [n] int64, all different: rows of logits.
        counts: [num_states, vocab] int32, not negative, encoded as this file's head says.
        count_indices: [n] int64: logits[row_indices[i]] is judged by counts[count_indices[i]].
        presence, frequency: [n] float32, finite; 0 does nothing, below 0 rewards.
        repetition: [n] float32, finite and above 0; 1 does nothing, below 1 rewards.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides; on the CPU also an index outside its table, before
            anything is written (on CUDA such an index is undefined behaviour).
    """
    _apply_penalties(logits, row_indices, counts, count_indices, presence, frequency, repetition)


def _check_count(counts: Tensor, count_indices: Tensor, token_ids: Tensor) -> Check:
    check = Check("count_tokens", counts.device)
    check.tensor("counts", counts, "num_states vocab", (torch.int32,))
    check.tensor("count_indices", count_indices, "n", (torch.int64,))
    check.tensor("token_ids", token_ids, "n", (torch.int64,))
    return check


def count_tokens_reference(counts: Tensor, count_indices: Tensor, token_ids: Tensor) -> None:
    """The op's meaning in plain PyTorch; it never waits for the device. What is not counted adds 0 to token 0."""
    check = _check_count(counts, count_indices, token_ids)
    check_ids(check, "count_indices", count_indices, counts.shape[0])
    check_ids(check, "token_ids", token_ids, counts.shape[1], lowest=None)
    if counts.numel():
        added = 2 * (token_ids >= 0).int()
        counts.index_put_((count_indices, token_ids.clamp(min=0)), added, accumulate=True)


def _count_fake(counts: Tensor, count_indices: Tensor, token_ids: Tensor) -> None:
    _check_count(counts, count_indices, token_ids)


_count_tokens = define(
    "count_tokens",
    "(Tensor(a!) counts, Tensor count_indices, Tensor token_ids) -> ()",
    count_tokens_reference,
    _count_fake,
)


def count_tokens(counts: Tensor, count_indices: Tensor, token_ids: Tensor) -> None:
    """In place: token_ids[i] was generated once more by the sequence of counts[count_indices[i]].

    Args:
        counts: [num_states, vocab] int32, written, encoded as this file's head says; last dimension contiguous.
        count_indices: [n] int64; the same row may come several times, with the same token too.
        token_ids: [n] int64; a negative one (`sample` gives -1 for a row that has no token) is not counted.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides; on the CPU also a row outside counts or a token id >=
            vocab, before anything is written (on CUDA that is undefined behaviour).
    """
    _count_tokens(counts, count_indices, token_ids)
