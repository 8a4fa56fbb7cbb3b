"""What one step computes (`Batch`) and what came of it (`BatchResult`): all that crosses between scheduler and runner.

A `Batch` is columns of ints and carries only what is new: tokens of this step that the device does not have, requests
that were just given a slot, block-table entries that changed. Everything else already lies on the device, in the row of
the request's slot.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotExtras:
    """What a request that has just been given `slot` wants beyond `SlotParams`; most requests have none.

    num_prompt_tokens: how many of token_ids are the prompt; the rest was generated before the request lost its slot.
    token_ids: the whole sequence so far, for penalties and bad words.
    logit_bias: (token id, what is added to its logit). allowed_token_ids: None allows all.
    bad_words: sequences of ids whose last id must not complete them.
    min_tokens, stop_ids: while fewer tokens than min_tokens were generated, none of stop_ids is drawn.
    logprobs: how many of the likeliest tokens are told beside the drawn one, whose logprob is told too; None tells
        nothing. prompt_logprobs: the same for the prompt's tokens.
    pooling: "last" or "mean": the request wants an embedding of its prompt, not text.
    """

    slot: int
    num_prompt_tokens: int
    token_ids: list[int]
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    pooling: str | None = None


@dataclass(slots=True)
class Batch:
    """The rows of one step, decode rows first, then prefill rows; a row is one request's query tokens.

    slots: row -> slot, the request's row in the device tables, 0 <= slot < max_num_seqs.
    starts: row -> position of its first query token, which is the number of its tokens already in the KV cache.
    lengths: row -> number of query tokens in this step.
    token_counts: row -> how many of them come in token_ids: all of a prefill row, 0 of a decode row, whose one token
        lies on the device in the slot's row.
    token_ids: the query tokens of the prefill rows, rows in order, concatenated.
    samples: rows that draw a token after this step, ascending: all decode rows and the prefill rows that reach the
        end of what is known of their sequence. The drawn ids come back in this order.
    new_slots: slots whose request is new since the last batch; what the slot's row held before is void.
    new_extras: of these, what some want beyond the usual.
    block_slots, block_indices, block_ids: changes of the block tables since the last batch, one entry a column:
        table[slot][index] = id. Later entries win over earlier ones of the same place.
    copy_sources, copy_targets: block copy_sources[i] of the KV cache is copied to block copy_targets[i] before the
        step computes; all sources are read before any target is written.
    scored_rows, scored_counts, scored_targets: prefill rows whose request wants logprobs of its prompt; the first
        scored_counts[i] query tokens of row scored_rows[i] are followed in the prompt by the tokens in scored_targets
        (rows concatenated), whose logprobs are wanted.
    """

    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    new_slots: list[SlotParams] = field(default_factory=list)
    new_extras: list[SlotExtras] = field(default_factory=list)
    block_slots: list[int] = field(default_factory=list)
    block_indices: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    copy_sources: list[int] = field(default_factory=list)
    copy_targets: list[int] = field(default_factory=list)
    scored_rows: list[int] = field(default_factory=list)
    scored_counts: list[int] = field(default_factory=list)
    scored_targets: list[int] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Query tokens of all rows together."""
        return sum(self.lengths)


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one position, by the model's own logits: before penalties, biases and
    temperature.

    token_id, logprob: the token that stands there. rank: 1 for the likeliest token, counting ties in its favour.
    top: (id, logprob) of the likeliest tokens, likeliest first, as many as the request asked for.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class BatchResult:
    """What a step gave back, in plain values.

    token_ids: the drawn id for each of batch.samples, -1 where the logits were no numbers.
    logprobs: index into batch.samples -> the drawn token's logprobs, where the slot asked for them and it was drawn.
    prompt_logprobs: row -> one entry for each of its scored targets.
    embeddings: index into batch.samples -> [hidden_size] floats, for the slots with pooling.
    """

    token_ids: list[int] = field(default_factory=list)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    embeddings: dict[int, list[float]] = field(default_factory=dict)
