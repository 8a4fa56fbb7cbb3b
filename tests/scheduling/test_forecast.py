"""The length forecast against a plain computation over the last answers, and the peak against a walk step by step."""

from __future__ import annotations

import random

import pytest

from minivllm.scheduling.forecast import Demand, LengthForecast, peak_demand

WINDOW = 512
BLOCK_SIZES = [8, 16, 32, 64, 128, 256]


def plain_expectation(lengths: list[int], num_generated: int, max_tokens: int) -> int:
    recent = lengths[-WINDOW:]
    longer = sorted(length for length in recent if length > num_generated)
    if longer:
        return min(max_tokens, longer[int(0.9 * (len(longer) - 1))])
    return min(max_tokens, 2 * num_generated) if recent else max_tokens


def test_lengths_agree_with_a_plain_computation(seed: int) -> None:
    rng = random.Random(seed)
    forecast, lengths = LengthForecast(), []
    longest = rng.choice([3, 100, 10_000])
    for _ in range(3 * WINDOW):
        max_tokens = rng.randint(1, 2 * longest)
        generated = rng.randint(0, max_tokens)
        expected = forecast.expect(generated, max_tokens)
        assert expected == plain_expectation(lengths, generated, max_tokens)
        assert generated <= expected <= max_tokens
        length = rng.randint(1, longest)
        forecast.record(length)
        lengths.append(length)


def test_nothing_known_means_the_longest_answer() -> None:
    assert LengthForecast().expect(0, 1000) == 1000
    assert LengthForecast().expect(999, 1000) == 1000


def test_nine_of_ten_of_the_longer_answers_are_within_the_forecast(seed: int) -> None:
    rng = random.Random(seed)
    forecast, lengths = LengthForecast(), [rng.randint(1, 1000) for _ in range(WINDOW)]
    for length in lengths:
        forecast.record(length)
    for generated in (0, 100, 500, 900):
        longer = [length for length in lengths if length > generated]
        expected = forecast.expect(generated, 10_000)
        assert sum(length <= expected for length in longer) >= 0.9 * (len(longer) - 1)
        assert sum(length < expected for length in longer) <= 0.9 * (len(longer) - 1)


def test_an_answer_longer_than_all_others_may_double() -> None:
    forecast = LengthForecast()
    for _ in range(10):
        forecast.record(20)
    assert forecast.expect(19, 1000) == 20
    assert forecast.expect(20, 1000) == 40
    assert forecast.expect(300, 1000) == 600
    assert forecast.expect(600, 1000) == 1000


def test_old_answers_are_forgotten() -> None:
    forecast = LengthForecast()
    for _ in range(WINDOW):
        forecast.record(900)
    for _ in range(WINDOW - 1):
        forecast.record(10)
    assert forecast.expect(50, 1000) == 900
    forecast.record(10)
    assert forecast.expect(50, 1000) == 100
    assert len(forecast._recent) == len(forecast._sorted) == WINDOW


def walked_peak(demands: list[Demand], block_size: int) -> int:
    """Blocks taken from those available now, followed token by token up to the last end."""
    peak, given_back = 0, 0
    for step in range(max((demand.remaining for demand in demands), default=0) + 1):
        alive = [demand for demand in demands if demand.remaining >= step]
        taken = sum(-(-(demand.num_tokens + step) // block_size) - demand.num_held for demand in alive)
        peak = max(peak, taken - given_back)
        given_back += sum(demand.num_private for demand in alive if demand.remaining == step)
    return peak


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_peak_is_never_too_low_and_hardly_too_high(block_size: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(150):
        demands = []
        for _ in range(rng.randint(0, 12)):
            num_tokens = rng.randint(1, 6 * block_size)
            num_held = rng.randint(0, -(-num_tokens // block_size))
            remaining = rng.choice([0, 1, 2, rng.randint(0, 6 * block_size)])
            demands.append(Demand(remaining, num_tokens, num_held, rng.randint(0, num_held)))
        true, peak = walked_peak(demands, block_size), peak_demand(demands, block_size)
        assert true <= peak <= true + len(demands)
        assert peak_demand(iter(rng.sample(demands, len(demands))), block_size) == peak, "their order means nothing"


def test_peaks_by_hand() -> None:
    assert peak_demand([], 8) == 0
    assert peak_demand([Demand(0, 8, 1, 1)], 8) == 0, "nothing more is taken"
    assert peak_demand([Demand(8, 8, 1, 1)], 8) == 1
    assert peak_demand([Demand(9, 8, 1, 1)], 8) == 2
    assert peak_demand([Demand(0, 80, 0, 0)], 8) == 10, "its prompt is not computed yet"
    early, late = Demand(8, 80, 10, 10), Demand(80, 8, 1, 1)
    assert peak_demand([early, late], 8) == 2, "what the first gives back is enough for the second"
    assert peak_demand([early._replace(num_private=0), late], 8) == 10, "it gives back nothing where all is shared"
