"""SamplingParams: every field's range, normalised spellings, combinations, bounds of containers, unknown names."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any

import pytest

from minivllm.errors import RequestError
from minivllm.sampling_params import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_BAD_WORD_CHARACTERS,
    MAX_BAD_WORD_IDS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIASES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

NO_COUNTS = [-1, 129, 1.0, True, "1", math.nan, [1]]
NO_BOOLS = [0, 1, "yes", None]
BAD = [
    ("temperature", [-0.1, math.nan, math.inf, -math.inf, True, "1", None, 10**400]),
    ("top_p", [0, 0.0, -0.5, 1.0001, math.nan, False, "0.9", None]),
    ("top_k", [-2, 1.0, True, "5", None, 2**31, math.nan]),
    ("min_p", [-0.1, 1.1, math.nan, True, "0", None]),
    ("presence_penalty", [-2.01, 2.01, math.nan, True, "0", None]),
    ("frequency_penalty", [-2.01, 2.01, math.inf, False, "0", None]),
    ("repetition_penalty", [0, 0.009, -1, 100.1, math.nan, math.inf, True, "1", None]),
    (
        "logit_bias",
        [
            5, "5", b"5", [5], {-1: 1}, {2**31: 1}, {1.0: 1}, {True: 1}, {"a": 1}, {"": 1}, {"-1": 1}, {"1.0": 1},
            {"\u0665": 1}, {"9" * 5000: 1}, {None: 1}, {1: None}, {1: "2"}, {1: math.nan}, {1: 100.5}, {1: -101},
            {1: True}, {1: 2, "1": 3}, [(1, 2, 3)], ["ab"], zip(itertools.count(), itertools.repeat(1)),
        ],
    ),
    ("allowed_token_ids", [5, "5", b"5", [], [-1], [1.0], [True], [None], [2**31], {1: 2}, itertools.count()]),
    (
        "bad_words",
        [
            5, "word", b"word", {"word": 1}, [""], [b"a"], [5], [[]], [None], [[-1]], [["a"]], [[True]], [[1.5]],
            [itertools.count()], ["a" * (MAX_BAD_WORD_CHARACTERS + 1)], [[1] * (MAX_BAD_WORD_IDS + 1)], ["\ud800"],
            itertools.repeat("a"), ["a"] * (MAX_BAD_WORDS // 2 + 1), [[1]] * (MAX_BAD_WORDS + 1),
        ],
    ),
    ("seed", [-(2**63) - 1, 2**63, 1.0, True, "7", math.nan]),
    ("max_tokens", [0, -1, 1.5, True, "16", None, math.inf]),
    ("min_tokens", [-1, 17, 1.5, True, "1", None]),
    (
        "stop",
        [
            5, b"a", "", [""], [5], [None], [["a"]], {"a": 1}, ["a", "\udfff"], "a" * (MAX_STOP_CHARACTERS + 1),
            ["a"] * (MAX_STOP_STRINGS + 1), itertools.repeat("a"),
        ],
    ),
    ("include_stop_str_in_output", NO_BOOLS),
    ("stop_token_ids", [5, "12", b"12", [-1], [1.0], ["1"], [True], [2**31], [[1]], {1: 1}, itertools.count()]),
    ("ignore_eos", NO_BOOLS),
    ("timeout", [0, -1, math.nan, math.inf, True, "5"]),
    ("n", [0, *NO_COUNTS, None, 10**6]),
    ("best_of", [0, *NO_COUNTS]),
    ("logprobs", [*NO_COUNTS, 10**6]),
    ("prompt_logprobs", [*NO_COUNTS, 10**6]),
    ("skip_special_tokens", NO_BOOLS),
    ("truncate_prompt_tokens", [0, -1, 1.5, True, "3"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD for value in values])
def test_bad_values_are_named(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"^{re.escape(name)}") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 400, "a hostile value floods the message"


def test_every_field_is_tested() -> None:
    assert {name for name, _ in BAD} == {field.name for field in dataclasses.fields(SamplingParams)}


def test_the_defaults() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": (),
        "allowed_token_ids": None,
        "bad_words": (),
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": (),
        "include_stop_str_in_output": False,
        "stop_token_ids": (),
        "ignore_eos": False,
        "timeout": None,
        "n": 1,
        "best_of": None,
        "logprobs": None,
        "prompt_logprobs": None,
        "skip_special_tokens": True,
        "truncate_prompt_tokens": None,
    }


LIMITS: list[dict[str, Any]] = [
    {"temperature": 0, "top_p": 1e-9, "top_k": 1, "min_p": 0, "max_tokens": 1, "seed": -(2**63), "min_tokens": 1},
    {"temperature": 1e9, "top_p": 1, "top_k": 2**31 - 1, "min_p": 1, "max_tokens": 10**30, "seed": 2**63 - 1},
    {"presence_penalty": -2, "frequency_penalty": -2, "repetition_penalty": 0.01, "timeout": 1e-9, "n": 128},
    {"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 100, "timeout": 1e9, "best_of": 128},
    {"logprobs": 0, "prompt_logprobs": 0, "truncate_prompt_tokens": 1, "n": 5, "best_of": 5},
    {"logprobs": 128, "prompt_logprobs": 128, "truncate_prompt_tokens": 10**30, "min_tokens": 16},
    {"stop": "a" * MAX_STOP_CHARACTERS},
    {"stop": ["a"] * MAX_STOP_STRINGS, "stop_token_ids": range(MAX_STOP_TOKEN_IDS)},
    {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIASES), 100), "bad_words": [[1]] * MAX_BAD_WORDS},
    {"bad_words": ["a" * MAX_BAD_WORD_CHARACTERS] * (MAX_BAD_WORDS // 2)},
    {"bad_words": [[1] * MAX_BAD_WORD_IDS]},
]


@pytest.mark.parametrize("options", LIMITS, ids=lambda options: ", ".join(options))
def test_limits_are_accepted(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    for name, value in options.items():
        if isinstance(value, int | float):
            assert getattr(params, name) == value
        elif name != "stop":
            assert len(getattr(params, name)) == len(value)


def test_a_whole_vocabulary_may_be_allowed() -> None:
    ids = range(MAX_ALLOWED_TOKEN_IDS)
    assert SamplingParams(allowed_token_ids=ids).allowed_token_ids == tuple(ids)
    with pytest.raises(RequestError, match=r"^allowed_token_ids has more than 1048576"):
        SamplingParams(allowed_token_ids=range(MAX_ALLOWED_TOKEN_IDS + 1))


def test_numbers_become_plain_numbers() -> None:
    params = SamplingParams(temperature=0, presence_penalty=1, timeout=3, logit_bias={1: 2})
    assert [type(params.temperature), type(params.presence_penalty), type(params.timeout)] == [float] * 3
    assert type(params.logit_bias[0][1]) is float
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_containers_become_tuples() -> None:
    ids = [1, 2, 3]
    params = SamplingParams(stop_token_ids=ids, bad_words=[ids, "no"])
    ids.append(4)
    assert params.stop_token_ids == (1, 2, 3)
    assert params.bad_words == ((1, 2, 3), "no")
    assert params == SamplingParams(stop_token_ids=iter((1, 2, 3)), bad_words=([1, 2, 3], "no"))
    assert SamplingParams(stop="end").stop == SamplingParams(stop=["end"]).stop == ("end",)
    assert SamplingParams(allowed_token_ids=[3, 1, 3, 2]).allowed_token_ids == (1, 2, 3)
    biases = SamplingParams(logit_bias={"7": 1, 5: -100, "06": 0.5}).logit_bias
    assert biases == ((5, -100.0), (6, 0.5), (7, 1.0))
    assert SamplingParams(logit_bias=biases).logit_bias == biases


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "logit_bias", "bad_words"])
def test_none_is_an_empty_container(name: str) -> None:
    assert SamplingParams(**{name: None}) == SamplingParams(**{name: []}) == SamplingParams()


def test_combinations() -> None:
    with pytest.raises(RequestError, match=r"^best_of is 2; it must be an integer from 3 to 128 \(n is 3\)$"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(RequestError, match=r"^min_tokens is 9; it must be an integer from 0 to 8 \(max_tokens\)$"):
        SamplingParams(min_tokens=9, max_tokens=8)
    assert SamplingParams(include_stop_str_in_output=True).stop == ()


def test_num_samples_counts_what_is_drawn() -> None:
    assert SamplingParams().num_samples == 1
    assert SamplingParams(n=4).num_samples == 4
    assert SamplingParams(n=4, best_of=9).num_samples == 9


def test_it_is_frozen_hashable_and_replaceable() -> None:
    options: dict[str, Any] = {"stop_token_ids": [9], "stop": ["a"], "logit_bias": {1: 1}, "bad_words": [[1], "b"]}
    params = SamplingParams(**options, allowed_token_ids=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]
    assert hash(params) == hash(SamplingParams(**options, allowed_token_ids=(1,)))
    assert dataclasses.replace(params, top_k=3, stop=()) == SamplingParams(
        **{**options, "stop": None}, allowed_token_ids=[1], top_k=3
    )
    with pytest.raises(RequestError, match="top_p"):
        dataclasses.replace(params, top_p=2)


def test_unknown_options_are_errors() -> None:
    with pytest.raises(RequestError, match="no option 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=0.5)
    with pytest.raises(RequestError, match="no option 'xyz'; it takes temperature, "):
        SamplingParams(xyz=2)
