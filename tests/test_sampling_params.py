"""SamplingParams: every field's range, normalised spellings, unknown names."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest

from minivllm.errors import RequestError
from minivllm.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams

BAD = [
    ("temperature", [-0.1, math.nan, math.inf, -math.inf, True, "1", None, 10**400]),
    ("top_p", [0, 0.0, -0.5, 1.0001, math.nan, False, "0.9", None]),
    ("top_k", [-2, 1.0, True, "5", None, 2**31, math.nan]),
    ("min_p", [-0.1, 1.1, math.nan, True, "0", None]),
    ("max_tokens", [0, -1, 1.5, True, "16", None, math.inf]),
    ("seed", [-(2**63) - 1, 2**63, 1.0, True, "7", math.nan]),
    ("stop_token_ids", [5, None, "12", b"12", [-1], [1.0], ["1"], [True], [2**31], [[1]], itertools.count()]),
    ("ignore_eos", [0, 1, "yes", None]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_bad_values_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(name)}"):
        SamplingParams(**{name: value})


def test_defaults_and_limits_are_accepted() -> None:
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "max_tokens": 16,
        "seed": None,
        "stop_token_ids": (),
        "ignore_eos": False,
    }
    low = SamplingParams(temperature=0, top_p=1e-9, top_k=1, min_p=0, max_tokens=1, seed=-(2**63))
    high = SamplingParams(temperature=1e9, top_p=1, top_k=2**31 - 1, min_p=1, max_tokens=10**30, seed=2**63 - 1)
    assert (low.seed, high.seed) == (-(2**63), 2**63 - 1)
    assert type(low.temperature) is float
    assert high.max_tokens == 10**30


def test_spellings_are_normalised() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    ids = [1, 2, 3]
    params = SamplingParams(stop_token_ids=ids)
    ids.append(4)
    assert params.stop_token_ids == (1, 2, 3)
    assert params == SamplingParams(stop_token_ids=iter((1, 2, 3)))
    assert SamplingParams(stop_token_ids=range(MAX_STOP_TOKEN_IDS)).stop_token_ids == tuple(range(MAX_STOP_TOKEN_IDS))


def test_it_is_frozen_hashable_and_replaceable() -> None:
    params = SamplingParams(stop_token_ids=[9])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]
    assert hash(params) == hash(SamplingParams(stop_token_ids=(9,)))
    assert dataclasses.replace(params, top_k=3).top_k == 3
    with pytest.raises(RequestError, match="top_p"):
        dataclasses.replace(params, top_p=2)


def test_unknown_options_are_errors() -> None:
    with pytest.raises(RequestError, match="no option 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=0.5)
    with pytest.raises(RequestError, match="no option 'best_of'; it takes temperature, "):
        SamplingParams(best_of=2)
