"""One sequence inside the engine (`Request`) and what its caller gets back (`RequestOutput`).

A `Request` is the state of one sequence. Only the scheduler changes it once it was added, and it moves on when its
tokens are handed to the runner, not when their results come back: that lets steps overlap. Parallel samples of one
prompt are several of them under one request id.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from minivllm.batch import TokenLogprobs
from minivllm.sampling_params import SamplingParams


class FinishReason(str, Enum):
    """Why a request ended; the values are those of OpenAI's `finish_reason`, and three of our own."""

    STOP = "stop"  # an end token, a stop token or a stop string came
    LENGTH = "length"  # max_tokens, or the model's context length, was reached
    ABORT = "abort"  # the caller gave up
    TIMEOUT = "timeout"  # its deadline passed
    ERROR = "error"  # the model's logits were not numbers, or its output could not be processed


class StepOutput(NamedTuple):
    """What one step gave one sequence: a token, an end, or both. sample: which one of the request.

    token_id is None where a deadline passed or the logits were no numbers.
    """

    request_id: str
    sample: int
    token_id: int | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class RequestMetrics:
    """Wall-clock times in seconds of `time.monotonic`: only differences mean anything. None: not reached.

    num_preemptions: how often it lost its place to others and was computed again.
    """

    arrival_time: float
    first_token_time: float | None
    finish_time: float | None
    num_preemptions: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """The mutable state of one sequence.

    index: which of the parallel samples of its prompt. leader: sample 0, whose prompt blocks the others share; None
        for sample 0 itself.
    prompt_token_ids: at least one id; never changed.
    max_tokens: the most tokens it may generate; `Scheduler.add` lowers it to what the context length leaves.
    stop_ids: ids that end it; the drawn one is still the last of its output_token_ids.
    seed: what its random draws are derived from.
    priority: lower runs first. cache_salt: it shares cached prefixes only with requests of the same salt.
    pooling: "last" or "mean" where an embedding of the prompt is wanted and no text.
    deadline: time of the scheduler's clock at which it ends, whatever it has; None: never.
    arrival_number: its place among all that were ever added.
    key, num_known: the tokens that were known when it last began to wait, in the cache's form, and their number.
    num_scheduled: tokens handed to the runner so far, which is the position of the next query token.
    num_to_schedule: num_scheduled when nothing is left to compute: prompt + max_tokens - 1, as the last token that is
        drawn never becomes a query. Set by `Scheduler.add`.
    num_cached_tokens: prompt tokens that were found in the cache when it first got a slot.
    slot: its row in the runner's tables while it runs, None before and after.
    logprobs: one entry an output token, where params.logprobs asks for them. prompt_logprobs: one entry for each
        prompt token but the first.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int]
    seed: int
    index: int = 0
    leader: Request | None = None
    priority: int = 0
    cache_salt: str | None = None
    pooling: str | None = None
    deadline: float | None = None
    arrival_number: int = 0
    key: bytes = b""
    num_known: int = 0
    num_scheduled: int = 0
    num_to_schedule: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    slot: int | None = None
    finish_reason: FinishReason | None = None
    arrival_time: float = 0.0
    first_token_time: float | None = None
    finish_time: float | None = None
    output_token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    embedding: list[float] | None = None

    @property
    def label(self) -> str:
        """The name people see: the request's id, and which sample where that is not the first."""
        return f"{self.request_id}/{self.index}" if self.index else self.request_id

    @property
    def metrics(self) -> RequestMetrics:
        """The times known so far."""
        return RequestMetrics(self.arrival_time, self.first_token_time, self.finish_time, self.num_preemptions)


@dataclass(frozen=True)
class Logprob:
    """One token at one position: its natural-log probability by the model's own logits (before penalties, biases and
    temperature), its rank (1 is the likeliest), and its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One generated continuation. `finish_reason` is a value of `FinishReason`, None while it goes on.

    token_ids: all generated ids, the one that ended it included.
    stop_reason: the stop string or the stop token id that ended it; None for an end token of the model, or another end.
    cumulative_logprob: sum of the logprobs of token_ids; None where they were not asked for.
    logprobs: one dict an output token: the drawn token and the likeliest ones, by id; None where not asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """What a request has given so far; `finished` once nothing more will come.

    prompt: the text, None where the caller gave token ids.
    num_cached_tokens: prompt tokens whose keys and values were found in the cache instead of computed.
    prompt_logprobs: one entry a prompt token, None for the first; None where they were not asked for.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    num_cached_tokens: int
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    @property
    def text(self) -> str:
        """The text of the first continuation."""
        return self.outputs[0].text
