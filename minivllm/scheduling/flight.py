"""A batch under construction and on its way: its columns, and whom each result belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from minivllm.batch import Batch, BatchResult
from minivllm.request import Request
from minivllm.scheduling.slot_state import slot_extras, slot_params, wants_prompt_logprobs


class Chunk(NamedTuple):
    """A piece of a prompt: row `row` computes the tokens from start to stop of `request`."""

    row: int
    request: Request
    start: int
    stop: int


@dataclass(slots=True)
class Flight:
    """A batch and what its results mean.

    draws: the requests of batch.samples, in that order.
    leaving: slot -> request that no later batch contains; its slot and blocks are given back when this one lands.
    """

    batch: Batch = field(default_factory=Batch)
    draws: list[Request] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    leaving: dict[int, Request] = field(default_factory=dict)

    def add_start(self, request: Request, slot: int, table: list[int], copies: Iterable[tuple[int, int]]) -> None:
        """`request` has been given `slot` and a block table that begins with the cached blocks `table`."""
        batch = self.batch
        batch.new_slots.append(slot_params(request, slot))
        extras = slot_extras(request, slot)
        if extras is not None:
            batch.new_extras.append(extras)
        self.add_entries(slot, enumerate(table))
        for source, target in copies:
            batch.copy_sources.append(source)
            batch.copy_targets.append(target)

    def add_entries(self, slot: int, entries: Iterable[tuple[int, int]]) -> None:
        """New (index, block) entries of the slot's block table."""
        batch = self.batch
        for index, block in entries:
            batch.block_slots.append(slot)
            batch.block_indices.append(index)
            batch.block_ids.append(block)

    def add_blocks(self, slots: list[int], entries: list[tuple[int, int]]) -> None:
        """One new (index, block) entry for each of `slots`."""
        self.batch.block_slots += slots
        self.batch.block_indices += [index for index, _ in entries]
        self.batch.block_ids += [block for _, block in entries]

    def add_decodes(self, requests: dict[int, Request], starts: list[int]) -> None:
        """One token for every request, by slot; they are the first rows of the batch."""
        batch, count = self.batch, len(requests)
        assert not batch.slots, "decode rows come first"
        batch.slots = list(requests)
        batch.starts = starts
        batch.lengths = [1] * count
        batch.token_counts = [0] * count
        batch.samples = list(range(count))
        self.draws = list(requests.values())

    def add_chunk(self, request: Request, slot: int, stop: int) -> None:
        """The known tokens of `request` from where it is to `stop`; a token is drawn where none is left then."""
        batch, start = self.batch, request.num_scheduled
        prompt, row = request.prompt_token_ids, len(batch.slots)
        known = prompt + request.output_token_ids if request.output_token_ids else prompt
        batch.slots.append(slot)
        batch.starts.append(start)
        batch.lengths.append(stop - start)
        batch.token_counts.append(stop - start)
        batch.token_ids += known[start:stop]
        self.chunks.append(Chunk(row, request, start, stop))
        num_scored = min(stop, len(prompt) - 1) - start
        if num_scored > 0 and wants_prompt_logprobs(request):
            batch.scored_rows.append(row)
            batch.scored_counts.append(num_scored)
            batch.scored_targets += prompt[start + 1 : start + 1 + num_scored]
        if stop == request.num_known:
            batch.samples.append(row)
            self.draws.append(request)

    def keep_extras(self, result: BatchResult) -> None:
        """Give each request that has not ended its logprobs and embeddings."""
        for index, entry in result.logprobs.items():
            request = self.draws[index]
            if request.finish_reason is None:
                request.cumulative_logprob += entry.logprob
                if request.params.logprobs is not None:
                    request.logprobs.append(entry)
        for index, embedding in result.embeddings.items():
            self.draws[index].embedding = embedding
