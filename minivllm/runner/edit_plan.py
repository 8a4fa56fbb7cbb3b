"""What is changed in a step's logits before the draw, as columns on the device.

A plan depends on which rows are edited and how, not on any drawn token, so the same plan serves step after step while
the same requests decode. What depends on tokens (counts, the last tokens of a sequence) is read on the device.

Notation: S rows of logits, V the vocabulary, K edited rows of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minivllm.runner.columns import FloatArray, IntArray, floats, ints, upload

_BANNED = float("-inf")


class SlotPenalties(NamedTuple):
    """count_row: the slot's row of token counts. The rest are the values of `SamplingParams`."""

    count_row: int
    presence: float
    frequency: float
    repetition: float


class SlotWords(NamedTuple):
    """tail_row: the slot's row of last tokens. words: bad words of two tokens or more."""

    tail_row: int
    words: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class SlotEdits:
    """How the logits of one slot's row are edited; None: not in this way.

    added_ids, added_values: what is added to the logits of these ids, -inf where one is banned for good.
    stop_ids: banned while fewer than `min_tokens` tokens were generated. num_prompt_tokens: where counting them begins.
    forbidden: bool [V] on the device, true for ids that are never drawn.
    """

    added_ids: IntArray
    added_values: FloatArray
    stop_ids: IntArray
    min_tokens: int
    num_prompt_tokens: int
    forbidden: Tensor | None
    penalties: SlotPenalties | None
    words: SlotWords | None

    @property
    def is_lasting(self) -> bool:
        """Whether anything is edited once `min_tokens` is reached."""
        others = (self.forbidden, self.penalties, self.words)
        return len(self.added_ids) > 0 or any(other is not None for other in others)


class EditedRow(NamedTuple):
    """Row `row` of the logits is edited as `edits` says; `bans_stop`: its stop ids are banned in this step."""

    row: int
    edits: SlotEdits
    bans_stop: bool


class Penalties(NamedTuple):
    """rows, count_rows: [K] int64, rows of the logits and of the token counts. The rest: [K] float32."""

    rows: Tensor
    count_rows: Tensor
    presence: Tensor
    frequency: Tensor
    repetition: Tensor


class Additions(NamedTuple):
    """places: index into the flattened logits, int64. values: what is added there, float32."""

    places: Tensor
    values: Tensor


class Masks(NamedTuple):
    """rows: [K] int64, rows of the logits. forbidden: [K, V] bool."""

    rows: Tensor
    forbidden: Tensor


class Words(NamedTuple):
    """Bad words of several tokens: W words, whose beginnings (all tokens but the last) have P tokens in all.

    rows, tail_rows: [K] int64, rows of the logits and of the last tokens. places: [W] int64, each word's last token as
    an index into the flattened logits. word_of, word_tail_rows, columns, ids: [P] int64: token ids[p] belongs to the
    beginning of word word_of[p] and must stand in tails[word_tail_rows[p], columns[p]], columns counted from the end.
    """

    rows: Tensor
    tail_rows: Tensor
    places: Tensor
    word_of: Tensor
    word_tail_rows: Tensor
    columns: Tensor
    ids: Tensor


@dataclass(frozen=True, eq=False, slots=True)
class EditPlan:
    """The edits of one step, by kind; None where no row has any of that kind."""

    penalties: Penalties | None
    additions: Additions | None
    masks: Masks | None
    words: Words | None


def make_plan(edited: Sequence[EditedRow], vocab_size: int, device: torch.device) -> EditPlan:
    """The plan of these rows, on `device`."""
    return EditPlan(
        penalties=_penalties(edited, device),
        additions=_additions(edited, vocab_size, device),
        masks=_masks(edited, device),
        words=_words(edited, vocab_size, device),
    )


def _penalties(edited: Sequence[EditedRow], device: torch.device) -> Penalties | None:
    penalised = [(row, edits.penalties) for row, edits, _ in edited if edits.penalties is not None]
    if not penalised:
        return None
    rows, penalties = zip(*penalised, strict=True)
    count_rows, *values = zip(*penalties, strict=True)
    columns = upload([ints(rows), ints(count_rows)], device)
    return Penalties(*columns, *upload([floats(column) for column in values], device))


def _additions(edited: Sequence[EditedRow], vocab_size: int, device: torch.device) -> Additions | None:
    places: list[IntArray] = []
    values: list[FloatArray] = []
    for row, edits, bans_stop in edited:
        places.append(edits.added_ids + row * vocab_size)
        values.append(edits.added_values)
        if bans_stop:
            places.append(edits.stop_ids + row * vocab_size)
            values.append(np.full(len(edits.stop_ids), _BANNED, dtype=np.float32))
    if not sum(map(len, places)):
        return None
    return Additions(*upload([np.concatenate(places)], device), *upload([np.concatenate(values)], device))


def _masks(edited: Sequence[EditedRow], device: torch.device) -> Masks | None:
    masked = [(row, edits.forbidden) for row, edits, _ in edited if edits.forbidden is not None]
    if not masked:
        return None
    [rows] = upload([ints([row for row, _ in masked])], device)
    return Masks(rows, torch.stack([forbidden for _, forbidden in masked]))


def _words(edited: Sequence[EditedRow], vocab_size: int, device: torch.device) -> Words | None:
    slots = [(row, edits.words) for row, edits, _ in edited if edits.words is not None]
    if not slots:
        return None
    words = [(row, slot.tail_row, word) for row, slot in slots for word in slot.words]
    lengths = ints([len(word) - 1 for _, _, word in words])
    columns = [
        ints([row for row, _ in slots]),
        ints([slot.tail_row for _, slot in slots]),
        ints([row * vocab_size + word[-1] for row, _, word in words]),
        np.repeat(np.arange(len(words)), lengths),
        np.repeat(ints([tail_row for _, tail_row, _ in words]), lengths),
        np.concatenate([np.arange(-length, 0) for length in lengths]),
        ints([token for _, _, word in words for token in word[:-1]]),
    ]
    return Words(*upload(columns, device))


def add_to_logits(logits: Tensor, additions: Additions) -> None:
    """logits: [S, V] float32, contiguous, changed in place. No place is named twice but with -inf."""
    logits.view(-1).index_add_(0, additions.places, additions.values)


def mask_logits(logits: Tensor, masks: Masks) -> None:
    """Forbidden ids become -inf in logits: [S, V], in place."""
    kept = logits.index_select(0, masks.rows).masked_fill_(masks.forbidden, _BANNED)
    logits.index_copy_(0, masks.rows, kept)


def ban_words(logits: Tensor, words: Words, tails: Tensor) -> None:
    """The last token of each word whose beginning stands at the end of its sequence becomes -inf, in place.

    logits: [S, V] float32, contiguous. tails: [rows, width] int64, the last tokens of sequences.
    """
    missing = (tails[words.word_tail_rows, words.columns] != words.ids).int()
    num_missing = torch.zeros_like(words.places, dtype=torch.int32).index_add_(0, words.word_of, missing)
    values = torch.zeros_like(words.places, dtype=torch.float32).masked_fill_(num_missing == 0, _BANNED)
    logits.view(-1).index_add_(0, words.places, values)


def shift_tails(tails: Tensor, words: Words, ids: Tensor) -> None:
    """The drawn ids [S] become the last tokens of their sequences, in place."""
    old = tails.index_select(0, words.tail_rows)[:, 1:]
    tails.index_copy_(0, words.tail_rows, torch.cat((old, ids.index_select(0, words.rows).unsqueeze(1)), dim=1))
