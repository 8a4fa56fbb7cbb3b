"""Beam search over a made-up model of few tokens: against all continuations there are, and against a plain search."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Sequence
from typing import Any

import pytest

from minivllm.beam_search import BeamSearchParams, Hypothesis, beam_search
from minivllm.errors import RequestError

VOCAB = 4
Ids = tuple[int, ...]


class Model:
    """Random logprobs of the next token after every sequence of up to `length` ids, drawn when first asked for."""

    def __init__(self, seed: int, *, spread: float = 2.0) -> None:
        self._seed, self._spread = seed, spread
        self.num_calls = 0

    def logprobs(self, index: int, ids: Sequence[int]) -> list[float]:
        rng = random.Random(f"{self._seed} {index} {list(ids)}")
        weights = [math.exp(rng.gauss(0.0, self._spread)) for _ in range(VOCAB)]
        return [math.log(weight / sum(weights)) for weight in weights]

    def likeliest(self, sequences: list[tuple[int, list[int]]]) -> list[Sequence[tuple[int, float]]]:
        self.num_calls += 1
        tables = [self.logprobs(index, ids) for index, ids in sequences]
        return [sorted(enumerate(table), key=lambda pair: -pair[1]) for table in tables]

    def total(self, index: int, ids: Sequence[int]) -> float:
        return sum(self.logprobs(index, ids[:place])[token] for place, token in enumerate(ids))


def every_continuation(max_tokens: int, stop_ids: Collection[int]) -> list[Ids]:
    """All that end with their first stop id, or without one at max_tokens."""
    found = []
    for length in range(1, max_tokens + 1):
        for ids in itertools.product(range(VOCAB), repeat=length):
            if not set(ids[:-1]) & set(stop_ids) and (ids[-1] in stop_ids or length == max_tokens):
                found.append(ids)
    return found


def plain_beams(model: Model, index: int, max_tokens: int, params: BeamSearchParams, stop_ids: set[int]) -> set[Ids]:
    """Beam search without any early end."""
    live: list[Ids] = [()]
    ended: list[Ids] = []
    for length in range(1, max_tokens + 1):
        longer = [(*ids, token) for ids in live for token in range(VOCAB)]
        ended += [ids for ids in longer if ids[-1] in stop_ids or length == max_tokens]
        live = [ids for ids in longer if ids[-1] not in stop_ids]
        live = sorted(live, key=lambda ids: -model.total(index, ids))[: params.beam_width]
        if length == max_tokens:
            ended = [ids for ids in ended if ids[-1] in stop_ids] + live
    return set(sorted(ended, key=lambda ids: -params.score(model.total(index, ids), len(ids)))[: params.beam_width])


@pytest.mark.parametrize("length_penalty", [-1.5, 0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("stop_ids", [(), (3,), (0, 2)])
def test_a_wide_search_finds_the_best_of_all(seed: int, length_penalty: float, stop_ids: Ids) -> None:
    model = Model(seed)
    params = BeamSearchParams(64, 3, length_penalty, False)
    [found] = beam_search([3], model.likeliest, params, stop_ids)
    totals = {ids: model.total(0, ids) for ids in every_continuation(3, stop_ids)}
    best = sorted(totals, key=lambda ids: -params.score(totals[ids], len(ids)))
    assert [tuple(one.token_ids) for one in found] == best[:64]
    for one in found:
        assert one.cumulative_logprob == pytest.approx(totals[tuple(one.token_ids)])
        assert one.finish_reason == ("stop" if one.token_ids[-1] in stop_ids else "length")


@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
def test_narrow_searches_of_many_prompts(seed: int, length_penalty: float) -> None:
    """Also: ending early changes nothing."""
    rng = random.Random(seed)
    for round_ in range(20):
        model, stop_ids = Model(seed + round_), {rng.randrange(VOCAB)}
        params = BeamSearchParams(rng.randint(1, 3), 6, length_penalty, False)
        lengths = [rng.randint(1, 6) for _ in range(4)]
        found = beam_search(lengths, model.likeliest, params, stop_ids)
        for index, (beams, most) in enumerate(zip(found, lengths, strict=True)):
            assert {tuple(one.token_ids) for one in beams} == plain_beams(model, index, most, params, stop_ids)
            scores = [params.score(one.cumulative_logprob, len(one.token_ids)) for one in beams]
            assert scores == sorted(scores, reverse=True)


def test_all_prompts_go_on_together_and_end_when_nothing_can_win(seed: int) -> None:
    model = Model(seed)
    beam_search([5, 2, 3], model.likeliest, BeamSearchParams(2, 5, 1.0, True), ())
    assert model.num_calls == 5
    certain: list[tuple[int, float]] = [(1, -0.01), (0, -5.0)]
    calls = []

    def likely_end(sequences: list[tuple[int, list[int]]]) -> list[Sequence[tuple[int, float]]]:
        calls.append(sequences)
        return [certain] * len(sequences)

    [[best]] = beam_search([1000], likely_end, BeamSearchParams(1, 1000, 0.0, False), {1})
    assert best == Hypothesis([1], -0.01, best.finish_reason)
    assert len(calls) == 1


def test_a_longer_beam_may_win_where_long_ones_are_punished() -> None:
    answers: dict[tuple[int, ...], list[tuple[int, float]]] = {(): [(0, -0.1), (1, -1.0)], (0,): [(1, -0.1), (0, -9.0)]}

    def next_tokens(sequences: list[tuple[int, list[int]]]) -> list[Sequence[tuple[int, float]]]:
        return [answers.get(tuple(ids), [(0, -9.0)]) for _, ids in sequences]

    [[best]] = beam_search([20], next_tokens, BeamSearchParams(1, 20, -1.0, False), {1})
    assert (best.token_ids, best.cumulative_logprob) == ([0, 1], pytest.approx(-0.2))


def test_how_many_next_tokens_are_asked_for() -> None:
    assert [BeamSearchParams(width, 9, 1.0, False).num_next_tokens(3) for width in (1, 2, 4, 64)] == [4, 5, 8, 128]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("beam_width", [0, 65, 1.0, True, None]),
        ("max_tokens", [0, -1, 1.5, "3", None]),
        ("length_penalty", [-11, 11, math.nan, "1", None, True]),
        ("ignore_eos", [0, 1, None]),
    ],
)
def test_bad_options_are_named(name: str, values: list[Any]) -> None:
    good = {"beam_width": 2, "max_tokens": 4, "length_penalty": 1.0, "ignore_eos": False}
    for value in values:
        with pytest.raises(RequestError, match=f"^{name} is"):
            BeamSearchParams(**{**good, name: value})  # type: ignore[arg-type]
