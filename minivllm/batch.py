"""What one step computes: the only value that crosses from the scheduler to the runner.

A `Batch` is columns of ints and carries only what is new: prompt tokens of this step, requests that were just given a
slot, block-table entries that grew. Everything else already lies on the device, in the row of the request's slot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class SlotParams(NamedTuple):
    """Sampling state of a request that has just been given `slot`; the values are those of `SamplingParams`."""

    slot: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int


@dataclass(slots=True)
class Batch:
    """The rows of one step, decode rows first, then prefill rows; a row is one request's query tokens.

    slots: row -> slot, the request's row in the device tables, 0 <= slot < max_num_seqs.
    starts: row -> position of its first query token, which is the number of its tokens already in the KV cache.
    lengths: row -> number of query tokens in this step.
    token_counts: row -> how many of them come in token_ids: all of a prefill row, 0 of a decode row, whose one token
        lies on the device in the slot's row.
    token_ids: the prompt tokens of this step, rows in order, concatenated.
    samples: rows that draw a token after this step, ascending: all decode rows and the prefill rows that reach the
        end of their prompt. The drawn ids come back in this order.
    new_slots: slots whose request is new since the last batch; what the slot's row held before is void.
    block_slots, block_indices, block_ids: growth of the block tables since the last batch, one entry a column:
        table[slot][index] = id. Entries of one slot come in ascending index.
    """

    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    new_slots: list[SlotParams] = field(default_factory=list)
    block_slots: list[int] = field(default_factory=list)
    block_indices: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Query tokens of all rows together."""
        return sum(self.lengths)
