"""SlotParams carry what every request has; SlotExtras exist exactly where something more is wanted."""

from __future__ import annotations

from typing import Any

import pytest

from minivllm.batch import SlotExtras, SlotParams, TokenLogprobs
from minivllm.scheduling.slot_state import (
    num_logprobs,
    num_prompt_logprobs,
    slot_extras,
    slot_params,
    wants_prompt_logprobs,
)
from tests.scheduling import make_request

PROMPT = [5, 6, 7]
WANTED = [
    {"presence_penalty": 0.5},
    {"frequency_penalty": -0.5},
    {"repetition_penalty": 1.5},
    {"logit_bias": ((3, 1.0),)},
    {"allowed_token_ids": (1, 2)},
    {"bad_words": ((1, 2), (3,))},
    {"logprobs": 0},
    {"logprobs": 5},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": 5},
    {"pooling": "last"},
    {"pooling": "mean"},
]
USUAL = [
    {},
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "seed": 4},
    {"ignore_eos": True, "stop_token_ids": (7,), "stop": ("end",), "timeout": 3.0, "skip_special_tokens": False},
    {"n": 3},
    {"n": 3, "best_of": 3},
    {"min_tokens": 5},  # nothing could end it earlier, as it has no stop_ids
]


def test_slot_params_are_those_of_the_request() -> None:
    request = make_request(PROMPT, temperature=0.5, top_k=3, top_p=0.75, min_p=0.25, seed=99)
    assert slot_params(request, 4) == SlotParams(4, 0.5, 3, 0.75, 0.25, request.seed)
    assert request.seed != 99, "a sample has a seed of its own"


@pytest.mark.parametrize("options", USUAL, ids=str)
def test_most_requests_want_nothing_more(options: dict[str, Any]) -> None:
    assert slot_extras(make_request(PROMPT, **options), 0) is None


@pytest.mark.parametrize("options", WANTED, ids=str)
def test_what_is_wanted_is_carried_and_nothing_else(options: dict[str, Any]) -> None:
    request = make_request(PROMPT, output_token_ids=[8, 9], **options)
    expected = SlotExtras(slot=4, num_prompt_tokens=3, token_ids=[5, 6, 7, 8, 9], **options)
    assert slot_extras(request, 4) == expected


def test_token_ids_are_a_copy() -> None:
    request = make_request(PROMPT, logprobs=0)
    extras = slot_extras(request, 0)
    assert extras is not None
    request.output_token_ids.append(1)
    extras.token_ids.append(2)
    assert (request.prompt_token_ids, extras.token_ids) == (PROMPT, [*PROMPT, 2])


def test_min_tokens_come_with_the_ids_that_they_hold_back() -> None:
    extras = slot_extras(make_request(PROMPT, min_tokens=5, stop=True), 0)
    assert extras == SlotExtras(slot=0, num_prompt_tokens=3, token_ids=PROMPT, min_tokens=5, stop_ids=(7,))
    assert slot_extras(make_request(PROMPT, stop=True), 0) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"logprobs": 3}, 3),
        ({"n": 2, "best_of": 2}, None),
        ({"n": 2, "best_of": 3}, 0),
        ({"n": 2, "best_of": 3, "logprobs": 4}, 4),
    ],
)
def test_choosing_the_best_needs_logprobs(options: dict[str, Any], expected: int | None) -> None:
    request = make_request(PROMPT, **options)
    assert num_logprobs(request) == expected
    extras = slot_extras(request, 0)
    assert (None if extras is None else extras.logprobs) == expected


def test_prompt_logprobs_are_wanted_until_all_are_known() -> None:
    entry = TokenLogprobs(1, -1.0, 1, ())
    request = make_request(PROMPT, prompt_logprobs=0)
    for known in range(4):
        request.prompt_logprobs = [entry] * known
        assert wants_prompt_logprobs(request) is (known < 2), "the first token of a prompt has none"
    assert not wants_prompt_logprobs(make_request(PROMPT))
    assert not wants_prompt_logprobs(make_request([1], prompt_logprobs=5))


def test_one_sample_tells_the_prompt_logprobs_for_all() -> None:
    leader = make_request(PROMPT, prompt_logprobs=5, n=2)
    sample = make_request(PROMPT, prompt_logprobs=5, n=2, leader=leader, index=1)
    assert (num_prompt_logprobs(leader), num_prompt_logprobs(sample)) == (5, None)
    assert not wants_prompt_logprobs(sample)
    assert slot_extras(sample, 0) is None
