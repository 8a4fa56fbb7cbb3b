"""What a step tells beside the drawn ids: logprobs of drawn tokens, logprobs of prompts, embeddings.

All of it is computed and copied without waiting for the device; only the plain values at the end (`Readout.fill`) are
made from what has arrived on the host. Logprobs are those of the model's own logits, so a row's logits are kept aside
before they are edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from minivllm.batch import Batch, BatchResult, SlotExtras, TokenLogprobs
from minivllm.ops import token_logprobs
from minivllm.runner.columns import ints, upload
from minivllm.runner.row_table import RowTable

SCORED_AT_ONCE = 256
"""Positions whose logprobs are computed at the same time; a vocabulary of 151,936 makes 148 MiB of float32 logits."""

_NUM_LOGPROB_COLUMNS = 5
Head = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class _Wanted:
    """What one slot wants told. num_summed: tokens whose hidden states are in sum_row, for mean pooling."""

    logprobs: int | None
    prompt_logprobs: int | None
    pooling: str | None
    sum_row: int | None
    num_summed: int = 0


@dataclass(slots=True)
class _Sum:
    """One row's part of a mean: hidden states start .. stop of the step go to row `row` of the sums."""

    start: int
    stop: int
    row: int


@dataclass(slots=True)
class Readout:
    """What one step tells.

    drawn: (index into the samples, number of likeliest tokens).
    scored_rows, scored_counts: rows of the batch, and how many positions of each are scored. scored_tops: with how many
    likeliest tokens each position is scored; scored_places: where it is among the step's tokens; scored_targets: the id
    that follows it.
    sums: parts of means. last: index into the samples -> where its last token is among the step's tokens; means: index
    into the samples -> (row of the sums, number of tokens in it).
    kept: the samples of drawn, on the device, and their logits as the model gave them, until the ids are drawn.
    tensors: what is to be copied to the host: logprob columns (`_entries`) of scored, embeddings, logprob columns of
    drawn, each where wanted.
    """

    drawn: list[tuple[int, int]] = field(default_factory=list)
    scored_rows: list[int] = field(default_factory=list)
    scored_counts: list[int] = field(default_factory=list)
    scored_tops: list[int] = field(default_factory=list)
    scored_places: list[int] = field(default_factory=list)
    scored_targets: list[int] = field(default_factory=list)
    sums: list[_Sum] = field(default_factory=list)
    last: dict[int, int] = field(default_factory=dict)
    means: dict[int, tuple[int, int]] = field(default_factory=dict)
    kept: tuple[Tensor, Tensor] | None = None
    tensors: list[Tensor] = field(default_factory=list)

    def fill(self, result: BatchResult, tensors: Sequence[Tensor]) -> None:
        """Add what is told to `result`, which has the ids; `tensors` are those of this readout, on the host."""
        left = list(tensors)
        if self.scored_rows:
            columns, left = left[:_NUM_LOGPROB_COLUMNS], left[_NUM_LOGPROB_COLUMNS:]
            entries = iter(_entries(columns, self.scored_tops))
            for row, count in zip(self.scored_rows, self.scored_counts, strict=True):
                result.prompt_logprobs[row] = [next(entries) for _ in range(count)]
        if self.last or self.means:
            embeddings = left.pop(0).tolist()
            result.embeddings.update(zip((*self.last, *self.means), embeddings, strict=True))
        if self.drawn:
            for (index, _), entry in zip(self.drawn, _entries(left, [top for _, top in self.drawn]), strict=True):
                if result.token_ids[index] >= 0:
                    result.logprobs[index] = entry


def _entries(columns: Sequence[Tensor], tops: Sequence[int]) -> list[TokenLogprobs]:
    """columns: ids, logprobs, ranks [N], top ids, top logprobs [N, K]; tops: how many of K each of the N wants."""
    rows = zip(*(column.tolist() for column in columns), tops, strict=True)
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(ids[:top], values[:top], strict=True)))
        for token, logprob, rank, ids, values, top in rows
    ]


class Readouts:
    """State of the slots that want something told; without any, a step costs it nothing."""

    def __init__(self, vocab_size: int, hidden_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._wanted: dict[int, _Wanted] = {}  # by slot
        self._sums = RowTable(hidden_size, torch.float32, device)

    def begin(self, batch: Batch) -> Readout | None:
        """Take over the batch's new slots; returns what the step is to tell, None for nothing."""
        self._update_slots(batch)
        if not self._wanted or self._wanted.keys().isdisjoint(batch.slots):
            return None
        readout = Readout()
        offsets = [0, *accumulate(batch.lengths)]
        sample_of = {row: index for index, row in enumerate(batch.samples)}
        for row, slot in enumerate(batch.slots):
            if slot in self._wanted:
                self._plan_row(readout, batch, row, offsets, sample_of.get(row))
        self._plan_scores(readout, batch, offsets)
        return readout

    def read_hidden(self, readout: Readout, hidden: Tensor, head: Head) -> None:
        """hidden: [T, hidden_size], all tokens of the step after the final norm; head: rows of it -> logits."""
        if readout.scored_rows:
            readout.tensors += self._score(readout, hidden, head)
        if readout.sums:
            parts = torch.stack([hidden[part.start : part.stop].sum(0, dtype=torch.float32) for part in readout.sums])
            [rows] = upload([ints([part.row for part in readout.sums])], self._device)
            self._sums.data.index_add_(0, rows, parts)
        if readout.last or readout.means:
            readout.tensors.append(self._embeddings(readout, hidden))

    def keep_logits(self, readout: Readout, logits: Tensor) -> None:
        """logits: [S, vocab_size] as the model gave them, which may be overwritten after this."""
        if readout.drawn:
            [samples] = upload([ints([index for index, _ in readout.drawn])], self._device)
            readout.kept = samples, logits.index_select(0, samples)

    def read_ids(self, readout: Readout, ids: Tensor) -> None:
        """ids: [S] int64, drawn, -1 for a failed draw."""
        if readout.kept is None:
            return
        samples, logits = readout.kept
        readout.kept = None
        pieces = logits.split(SCORED_AT_ONCE)
        readout.tensors += self._logprobs(pieces, ids.index_select(0, samples), [top for _, top in readout.drawn])

    def _update_slots(self, batch: Batch) -> None:
        if self._wanted:
            for params in batch.new_slots:
                self._void(params.slot)
        for extras in batch.new_extras:
            if (extras.logprobs, extras.prompt_logprobs, extras.pooling) != (None, None, None):
                self._wanted[extras.slot] = self._make_wanted(extras)

    def _make_wanted(self, extras: SlotExtras) -> _Wanted:
        sum_row = self._sums.take() if extras.pooling == "mean" else None
        if sum_row is not None:
            self._sums.data[sum_row].zero_()
        return _Wanted(extras.logprobs, extras.prompt_logprobs, extras.pooling, sum_row)

    def _void(self, slot: int) -> None:
        wanted = self._wanted.pop(slot, None)
        if wanted is not None and wanted.sum_row is not None:
            self._sums.give(wanted.sum_row)

    def _plan_row(self, readout: Readout, batch: Batch, row: int, offsets: list[int], index: int | None) -> None:
        """Row `row` is sample `index`, or draws nothing."""
        wanted = self._wanted[batch.slots[row]]
        if wanted.sum_row is not None:
            assert wanted.num_summed == batch.starts[row], "a mean needs the hidden states of all tokens"
            wanted.num_summed += batch.lengths[row]
            readout.sums.append(_Sum(offsets[row], offsets[row + 1], wanted.sum_row))
        if index is None:
            return
        if wanted.logprobs is not None:
            readout.drawn.append((index, wanted.logprobs))
        if wanted.sum_row is not None:
            readout.means[index] = wanted.sum_row, wanted.num_summed
        elif wanted.pooling is not None:
            readout.last[index] = offsets[row + 1] - 1

    def _plan_scores(self, readout: Readout, batch: Batch, offsets: list[int]) -> None:
        for row, count in zip(batch.scored_rows, batch.scored_counts, strict=True):
            wanted = self._wanted[batch.slots[row]]
            assert wanted.prompt_logprobs is not None, "a row is scored whose slot did not ask for it"
            readout.scored_tops += [wanted.prompt_logprobs] * count
            readout.scored_places += range(offsets[row], offsets[row] + count)
        readout.scored_rows, readout.scored_counts = batch.scored_rows, batch.scored_counts
        readout.scored_targets = batch.scored_targets

    def _score(self, readout: Readout, hidden: Tensor, head: Head) -> tuple[Tensor, ...]:
        """Logprob columns of all scored positions; the logits of a few of them exist at a time."""
        places, targets = upload([ints(readout.scored_places), ints(readout.scored_targets)], self._device)
        pieces = (head(hidden.index_select(0, some)) for some in places.split(SCORED_AT_ONCE))
        return self._logprobs(pieces, targets, readout.scored_tops)

    def _logprobs(self, pieces: Iterable[Tensor], ids: Tensor, tops: list[int]) -> tuple[Tensor, ...]:
        """Logprob columns (`_entries`) of ids [N], from pieces of logits of SCORED_AT_ONCE rows each."""
        num_top = min(max(tops), self._vocab_size)
        results = [token_logprobs(*piece, num_top) for piece in zip(pieces, ids.split(SCORED_AT_ONCE), strict=True)]
        return ids, *(torch.cat(column) for column in zip(*results, strict=True))

    def _embeddings(self, readout: Readout, hidden: Tensor) -> Tensor:
        """[last first, then means; hidden_size] float32."""
        rows = [row for row, _ in readout.means.values()]
        counts = [count for _, count in readout.means.values()]
        last, mean_rows, num_tokens = upload(
            [ints(list(readout.last.values())), ints(rows), ints(counts)], self._device
        )
        means = self._sums.data.index_select(0, mean_rows) / num_tokens.unsqueeze(1)
        return torch.cat((hidden.index_select(0, last).float(), means))
