"""Beam search: of all continuations, look for the likeliest as a whole, keeping the best few at each length.

The search asks for one thing only, the likeliest next tokens of given sequences, and never sees who answers. Whoever
answers through a prefix cache computes one token a beam and step, however long the beams are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from minivllm.errors import RequestError
from minivllm.options import check_bool, check_float, check_int
from minivllm.request import FinishReason
from minivllm.sampling_params import MAX_LOGPROBS
from minivllm.text import Tokenizer

NextTokens = Callable[[list[tuple[int, list[int]]]], list[Sequence[tuple[int, float]]]]
"""For each (index of the prompt, generated ids so far): (id, logprob) of the likeliest next tokens."""


@dataclass(frozen=True)
class Beam:
    """One continuation.

    score: cumulative_logprob / len(token_ids) ** length_penalty, by which beams are compared.
    finish_reason: "stop" where an end token, the last of token_ids, came; else "length".
    """

    token_ids: list[int]
    text: str
    cumulative_logprob: float
    score: float
    finish_reason: str


@dataclass(frozen=True)
class BeamSearchOutput:
    """The best continuations of one prompt, at most beam_width, best first."""

    prompt: str | None
    prompt_token_ids: list[int]
    beams: list[Beam]

    @property
    def text(self) -> str:
        """The text of the best continuation."""
        return self.beams[0].text


@dataclass(frozen=True)
class BeamSearchParams:
    """Options of `LLM.beam_search`, where they are explained. Raises RequestError, naming the field and its range."""

    beam_width: int
    max_tokens: int
    length_penalty: float
    ignore_eos: bool

    def __post_init__(self) -> None:
        check_int("beam_width", self.beam_width, 1, MAX_LOGPROBS // 2, RequestError)
        check_int("max_tokens", self.max_tokens, 1, None, RequestError)
        check_float("length_penalty", self.length_penalty, -10.0, 10.0, RequestError)
        check_bool("ignore_eos", self.ignore_eos, RequestError)

    def score(self, cumulative_logprob: float, length: int) -> float:
        """As logprobs are negative, a length_penalty above 0 favours long continuations."""
        return cumulative_logprob / math.pow(length, self.length_penalty)

    def num_next_tokens(self, num_stop_ids: int) -> int:
        """How many next tokens of a beam can matter: it may be continued beam_width times, end tokens apart."""
        return min(max(2 * self.beam_width, self.beam_width + num_stop_ids), MAX_LOGPROBS)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A continuation under search. finish_reason: None while it goes on."""

    token_ids: list[int]
    cumulative_logprob: float
    finish_reason: FinishReason | None = None


@dataclass(slots=True)
class _Search:
    """The search of one prompt. live: all of one length, best first. ended: the best that have ended, best first."""

    index: int
    max_tokens: int
    live: list[Hypothesis] = field(default_factory=lambda: [Hypothesis([], 0.0)])
    ended: list[Hypothesis] = field(default_factory=list)


def beam_search(
    max_tokens: Sequence[int], next_tokens: NextTokens, params: BeamSearchParams, stop_ids: Collection[int]
) -> list[list[Hypothesis]]:
    """The best continuations of each prompt, best first; all prompts go on together, a token a step.

    A continuation ends with one of stop_ids, or when it is as long as its prompt's entry of max_tokens.
    """
    searches = [_Search(index, most) for index, most in enumerate(max_tokens)]
    while open_ := [search for search in searches if search.live]:
        answers = iter(next_tokens([(search.index, beam.token_ids) for search in open_ for beam in search.live]))
        for search in open_:
            _extend(search, [(beam, next(answers)) for beam in search.live], params, stop_ids)
            _end(search, params)
    return [search.ended for search in searches]


def make_beams(tokenizer: Tokenizer, found: Sequence[Hypothesis], params: BeamSearchParams) -> list[Beam]:
    """Continuations that have ended, with their text."""
    beams = []
    for one in found:
        assert one.finish_reason is not None, "it goes on"
        text, score = tokenizer.decode(one.token_ids), params.score(one.cumulative_logprob, len(one.token_ids))
        beams.append(Beam(one.token_ids, text, one.cumulative_logprob, score, one.finish_reason.value))
    return beams


def _extend(
    search: _Search,
    answers: Sequence[tuple[Hypothesis, Sequence[tuple[int, float]]]],
    params: BeamSearchParams,
    stop_ids: Collection[int],
) -> None:
    """The likeliest extensions by one token live on; every one by an end token has ended."""
    extended = [
        Hypothesis(
            [*beam.token_ids, token],
            beam.cumulative_logprob + logprob,
            FinishReason.STOP if token in stop_ids else None,
        )
        for beam, tokens in answers
        for token, logprob in tokens
    ]
    extended.sort(key=lambda one: -one.cumulative_logprob)
    search.ended += [one for one in extended if one.finish_reason is not None]
    search.live = [one for one in extended if one.finish_reason is None][: params.beam_width]


def _end(search: _Search, params: BeamSearchParams) -> None:
    """End the beams that are as long as allowed, and the whole search where none of them can win any more."""
    if search.live and len(search.live[0].token_ids) == search.max_tokens:
        full = [Hypothesis(one.token_ids, one.cumulative_logprob, FinishReason.LENGTH) for one in search.live]
        search.ended, search.live = search.ended + full, []
    search.ended.sort(key=lambda one: -params.score(one.cumulative_logprob, len(one.token_ids)))
    del search.ended[params.beam_width :]
    if search.live and len(search.ended) == params.beam_width:
        best, worst = search.live[0], search.ended[-1]
        # Logprobs are never positive, so the best a live beam can reach is its own, at the most favourable length.
        length = search.max_tokens if params.length_penalty > 0 else len(best.token_ids) + 1
        if params.score(best.cumulative_logprob, length) <= params.score(
            worst.cumulative_logprob, len(worst.token_ids)
        ):
            search.live = []
