"""One request inside the engine (`Request`) and what its caller gets back (`RequestOutput`).

A `Request` is the state of one sequence. Only the scheduler changes it once it was added, and it moves on when its
tokens are handed to the runner, not when their results come back: that lets steps overlap.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from minivllm.sampling_params import SamplingParams


class FinishReason(str, Enum):
    """Why a request ended; the values are those of OpenAI's `finish_reason`, and two of our own."""

    STOP = "stop"  # an end token or a stop token was drawn
    LENGTH = "length"  # max_tokens, or the model's context length, was reached
    ABORT = "abort"  # the caller gave up
    ERROR = "error"  # the model's logits were not numbers


@dataclass(frozen=True)
class RequestMetrics:
    """Wall-clock times in seconds of `time.monotonic`: only differences mean anything. None: not reached."""

    arrival_time: float
    first_token_time: float | None
    finish_time: float | None


@dataclass(slots=True, eq=False)
class Request:
    """The mutable state of one sequence.

    prompt_token_ids: at least one id; never changed.
    max_tokens: the most tokens it may generate; `Scheduler.add` lowers it to what the context length leaves.
    stop_ids: ids that end it; the drawn one is still the last of its output_token_ids.
    seed: what its random draws are derived from.
    num_scheduled: tokens handed to the runner so far, which is the position of the next query token.
    num_to_schedule: num_scheduled when nothing is left to compute: prompt + max_tokens - 1, as the last token that is
        drawn never becomes a query. Set by `Scheduler.add`.
    slot: its row in the runner's tables while it runs, None before and after.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    stop_ids: frozenset[int]
    seed: int
    output_token_ids: list[int] = field(default_factory=list)
    num_scheduled: int = 0
    num_to_schedule: int = 0
    slot: int | None = None
    finish_reason: FinishReason | None = None
    arrival_time: float = 0.0
    first_token_time: float | None = None
    finish_time: float | None = None

    @property
    def metrics(self) -> RequestMetrics:
        """The times known so far."""
        return RequestMetrics(self.arrival_time, self.first_token_time, self.finish_time)


@dataclass(frozen=True)
class CompletionOutput:
    """One generated continuation. `finish_reason` is a value of `FinishReason`, None while it goes on."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


@dataclass(frozen=True)
class RequestOutput:
    """What a request has given so far; `finished` once nothing more will come.

    prompt: the text, None where the caller gave token ids.
    num_cached_tokens: prompt tokens whose keys and values were found in the cache instead of computed.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    num_cached_tokens: int
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics

    @property
    def text(self) -> str:
        """The text of the first continuation."""
        return self.outputs[0].text
