"""Prompts, continuations, priorities and parameters: every spelling becomes one, and a wrong one is named."""

from __future__ import annotations

from typing import Any

import pytest

from minivllm.errors import RequestError
from minivllm.hub import BUNDLED_MODEL
from minivllm.prompts import (
    MAX_CACHE_SALT_CHARACTERS,
    params_for_each,
    params_for_engine,
    parse_continuations,
    parse_conversations,
    parse_prompts,
    priorities_for_each,
)
from minivllm.sampling_params import MAX_BAD_WORD_CHARACTERS, SamplingParams
from minivllm.text import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(BUNDLED_MODEL)


def test_every_spelling_of_a_prompt(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("A fox")
    spellings: list[Any] = [
        "A fox", ids, tuple(ids), {"prompt": "A fox"}, {"prompt": ids}, {"prompt_token_ids": ids},
        {"prompt": "told", "prompt_token_ids": ids}, {"prompt": "A fox", "cache_salt": "me"},
        {"prompt_token_ids": ids, "cache_salt": "me"}, {"prompt": "A fox", "cache_salt": None},
    ]  # fmt: skip
    together = parse_prompts(tokenizer, spellings)
    assert together == [one for spelling in spellings for one in parse_prompts(tokenizer, spelling)]
    assert [one.token_ids for one in together] == [ids] * len(spellings)
    assert [one.text for one in together] == [
        "A fox", None, None, "A fox", None, None, "told", "A fox", None, "A fox"
    ]  # fmt: skip
    assert [one.cache_salt for one in together] == [None] * 7 + ["me", "me", None]


BAD_PROMPTS: list[tuple[Any, str]] = [
    ("", "the prompt is empty"),
    ([], "prompts is an empty list"),
    (None, "prompts is None"),
    (b"ab", "prompts is b'ab'"),
    (5, "prompts is 5"),
    ({"a", "b"}, "prompts is {"),
    (["a", None], r"prompts\[1\] is None"),
    (["a", ""], r"prompts\[1\] is empty"),
    ([[1], []], r"prompts\[1\] is empty"),
    ({}, r"the prompt has the keys \[\]"),
    ({"cache_salt": "a"}, r"the prompt has the keys \['cache_salt'\]"),
    ({"prompt": "a", "text": "b"}, "may have cache_salt"),
    ({5: 1, "prompt": "a"}, "the prompt has the keys"),
    ({"prompt": None}, r"the prompt\['prompt'\] is None"),
    ({"prompt": {"prompt": "a"}}, r"the prompt\['prompt'\] is {'prompt'"),
    ({"prompt_token_ids": "ab"}, "prompt_token_ids must be a list"),
    ({"prompt_token_ids": 5}, r"the prompt\['prompt_token_ids'\] is 5"),
    ({"prompt_token_ids": [1], "prompt": 5}, "and prompt a str"),
    ([{"prompt": "a", "cache_salt": ""}], r"prompts\[0\]\['cache_salt'\] is ''"),
    ({"prompt": "a", "cache_salt": 5}, "'cache_salt'] is 5; it must be a str of 1 to 256 characters, or None"),
    ({"prompt": "a", "cache_salt": "x" * (MAX_CACHE_SALT_CHARACTERS + 1)}, "'cache_salt'] is 'xxx"),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS)
def test_a_bad_prompt_is_named(tokenizer: Tokenizer, prompts: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_prompts(tokenizer, prompts)


def test_a_conversation_or_a_list_of_them(tokenizer: Tokenizer) -> None:
    one = [{"role": "user", "content": "hello"}]
    assert parse_conversations(tokenizer, [one, one], None, {}) == parse_conversations(tokenizer, one, None, {}) * 2
    for bad in ("hello", [], None, 3, b"a"):
        with pytest.raises(RequestError, match="messages is"):
            parse_conversations(tokenizer, bad, None, {})


def test_continuations(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" and on")
    assert parse_continuations(tokenizer, [" and on", ids, [7]], 3) == [ids, ids, [7]]
    assert parse_continuations(tokenizer, " and on", 1) == parse_continuations(tokenizer, ids, 1) == [ids]


@pytest.mark.parametrize(
    ("continuations", "message"),
    [
        (None, "continuations is None"),
        (b"a", "continuations is b'a'"),
        ({"a": 1}, "continuations is {"),
        ("one", "continuations has 1 entries for 2 prompts"),
        ([1, 2], "continuations has 1 entries for 2 prompts"),
        (["a", "b", "c"], "continuations has 3 entries for 2 prompts"),
        (["a", ""], r"continuations\[1\] is ''"),
        (["a", []], r"continuations\[1\] is \[\]"),
        (["a", {"prompt": "a"}], r"continuations\[1\] is {"),
        ([None, "a"], r"continuations\[0\] is None"),
        (["a", "\ud800"], "lone surrogate"),
    ],
)
def test_bad_continuations_are_named(tokenizer: Tokenizer, continuations: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_continuations(tokenizer, continuations, 2)


def test_params_for_each() -> None:
    params = SamplingParams(n=2)
    assert params_for_each(None, 2) == [SamplingParams()] * 2
    assert params_for_each(params, 3) == [params] * 3
    assert params_for_each((params, SamplingParams()), 2) == (params, SamplingParams())
    for bad, message in (([params], "1 entries for 2"), ([params, None], "must be a"), ("ab", "must be a")):
        with pytest.raises(RequestError, match=message):
            params_for_each(bad, 2)


def test_priorities_for_each() -> None:
    assert priorities_for_each(3, 2) == [3, 3]
    assert priorities_for_each([1, -1], 2) == [1, -1]
    with pytest.raises(RequestError, match="priority has 3 entries for 2 prompts"):
        priorities_for_each((1, 2, 3), 2)


def test_the_engine_gets_no_text(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop=["a"], bad_words=["fox", " cat", [5, 6], "fox"], min_tokens=3, n=2)
    told = params_for_engine(tokenizer, params)
    forms = [tokenizer.encode(form) for form in ("fox", " fox", " cat")]
    assert told.bad_words == (*map(tuple, forms), (5, 6))
    assert told == SamplingParams(bad_words=told.bad_words, min_tokens=3, n=2)
    assert forms[0] != forms[1], "the tokenizer spells both forms alike, so this shows little"


def test_params_without_text_stay_what_they_are(tokenizer: Tokenizer) -> None:
    params = SamplingParams(bad_words=[[1, 2]], temperature=0.5)
    assert params_for_engine(tokenizer, params) is params


def test_the_largest_bad_words_fit(tokenizer: Tokenizer) -> None:
    longest = SamplingParams(bad_words=["\U0001f600" * MAX_BAD_WORD_CHARACTERS])
    assert all(len(word) <= 1024 for word in params_for_engine(tokenizer, longest).bad_words)
    many = SamplingParams(bad_words=[f"word{index}" for index in range(256)])
    assert len(params_for_engine(tokenizer, many).bad_words) == 512
