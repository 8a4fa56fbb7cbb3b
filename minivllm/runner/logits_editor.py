"""Edits logits before the draw, for the slots that ask for it: penalties, biases, allowed ids, bad words, min_tokens.

Whatever depends on drawn tokens lies on the device, in a row that a slot holds as long as it needs one: how often each
token was seen, and the last tokens of the sequence. So the next step can be launched before this one's ids are known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minivllm.batch import Batch, SlotExtras
from minivllm.ops import apply_penalties, count_tokens
from minivllm.runner.columns import IntArray, floats, ints, upload
from minivllm.runner.edit_plan import (
    EditedRow,
    EditPlan,
    SlotEdits,
    SlotPenalties,
    SlotWords,
    add_to_logits,
    ban_words,
    make_plan,
    mask_logits,
    shift_tails,
)
from minivllm.runner.row_table import RowTable

_NO_TOKEN = -1
_IN_PROMPT, _GENERATED_ONCE = 1, 2  # a count is 2 x (times generated) + (1 where in the prompt)


class LogitsEditor:
    """State of the slots whose logits are edited; without any, a step costs it nothing."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._edits: dict[int, SlotEdits] = {}  # by slot
        self._counts = RowTable(vocab_size, torch.int32, device)
        self._tails = RowTable(0, torch.int64, device)
        self._planned: tuple[list[EditedRow], EditPlan] | None = None  # the last step's plan, and of which rows

    def begin(self, batch: Batch) -> EditPlan | None:
        """Take over the batch's new slots; returns how its samples' logits are to be edited, None for not at all."""
        self._update_slots(batch)
        if not self._edits or self._edits.keys().isdisjoint(batch.slots):
            return None
        rows = self._edited_rows(batch)
        if not rows:
            return None
        if self._planned is None or self._planned[0] != rows:
            self._planned = rows, make_plan(rows, self._vocab_size, self._device)
        return self._planned[1]

    def edit(self, plan: EditPlan, logits: Tensor) -> Tensor:
        """logits: [S, vocab_size], overwritten where they are float32 -> the edited ones, float32."""
        logits = logits.float().contiguous()
        if plan.penalties is not None:
            apply_penalties(logits, plan.penalties.rows, self._counts.data, *plan.penalties[1:])
        if plan.additions is not None:
            add_to_logits(logits, plan.additions)
        if plan.masks is not None:
            mask_logits(logits, plan.masks)
        if plan.words is not None:
            ban_words(logits, plan.words, self._tails.data)
        return logits

    def drawn(self, plan: EditPlan, ids: Tensor) -> None:
        """ids: [S] int64 drawn from the edited logits, -1 for a failed draw: they are part of the sequences now."""
        if plan.penalties is not None:
            count_tokens(self._counts.data, plan.penalties.count_rows, ids.index_select(0, plan.penalties.rows))
        if plan.words is not None:
            shift_tails(self._tails.data, plan.words, ids)

    def _update_slots(self, batch: Batch) -> None:
        if self._edits:
            for params in batch.new_slots:
                self._void(params.slot)
        for extras in batch.new_extras:
            edits = self._make_edits(extras)
            if edits.is_lasting or edits.min_tokens > 0:
                self._edits[extras.slot] = edits

    def _void(self, slot: int) -> None:
        edits = self._edits.pop(slot, None)
        if edits is None:
            return
        if edits.penalties is not None:
            self._counts.give(edits.penalties.count_row)
        if edits.words is not None:
            self._tails.give(edits.words.tail_row)

    def _edited_rows(self, batch: Batch) -> list[EditedRow]:
        rows = []
        for index, row in enumerate(batch.samples):
            edits = self._edits.get(batch.slots[row])
            if edits is not None:
                num_generated = batch.starts[row] + batch.lengths[row] - edits.num_prompt_tokens
                bans_stop = num_generated < edits.min_tokens
                if bans_stop or edits.is_lasting:
                    rows.append(EditedRow(index, edits, bans_stop))
        return rows

    def _make_edits(self, extras: SlotExtras) -> SlotEdits:
        bans = [word[0] for word in extras.bad_words if len(word) == 1]
        biases = [*extras.logit_bias, *((token, -np.inf) for token in bans)]
        return SlotEdits(
            added_ids=self._ids([token for token, _ in biases]),
            added_values=floats([value for _, value in biases]),
            stop_ids=self._ids(extras.stop_ids),
            min_tokens=extras.min_tokens if extras.stop_ids else 0,
            num_prompt_tokens=extras.num_prompt_tokens,
            forbidden=self._forbidden(extras.allowed_token_ids),
            penalties=self._penalties(extras),
            words=self._words(extras),
        )

    def _penalties(self, extras: SlotExtras) -> SlotPenalties | None:
        """The penalties, and a row of counts that holds the sequence so far."""
        penalties = (extras.presence_penalty, extras.frequency_penalty, extras.repetition_penalty)
        if penalties == (0.0, 0.0, 1.0):
            return None
        row = self._counts.take()
        ids, num_prompt = self._ids(extras.token_ids), extras.num_prompt_tokens
        prompt, generated = upload([ids[:num_prompt], ids[num_prompt:]], self._device)
        counts = self._counts.data[row].zero_().index_fill_(0, prompt, _IN_PROMPT)
        counts.index_add_(0, generated, torch.full_like(generated, _GENERATED_ONCE, dtype=torch.int32))
        return SlotPenalties(row, *penalties)

    def _words(self, extras: SlotExtras) -> SlotWords | None:
        """The bad words of several tokens, and a row of last tokens that holds the end of the sequence so far."""
        words = tuple(word for word in extras.bad_words if len(word) > 1)
        if not words:
            return None
        self._ids([word[-1] for word in words])
        self._tails.widen(max(map(len, words)) - 1, _NO_TOKEN)
        row, width = self._tails.take(), self._tails.data.shape[1]
        known = extras.token_ids[-width:]
        [tail] = upload([ints([_NO_TOKEN] * (width - len(known)) + known)], self._device)
        self._tails.data[row] = tail
        return SlotWords(row, words)

    def _forbidden(self, allowed: tuple[int, ...] | None) -> Tensor | None:
        if allowed is None:
            return None
        forbidden = np.ones(self._vocab_size, dtype=np.bool_)
        forbidden[self._ids(allowed)] = False
        return upload([forbidden], self._device)[0]

    def _ids(self, token_ids: Sequence[int]) -> IntArray:
        """A column of ids of the vocabulary: another one would be written outside of the logits."""
        ids = ints(token_ids)
        assert not len(ids) or (ids.min() >= 0 and ids.max() < self._vocab_size), "an id outside of the vocabulary"
        return ids
