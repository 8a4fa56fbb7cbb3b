"""Pieces of a stream, joined, are the whole decode, wherever the stream was cut."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from minivllm.errors import RequestError
from minivllm.text import IncrementalDetokenizer, Tokenizer


def streamed(tokenizer: Tokenizer, ids: Sequence[int], rng: random.Random, **options: Any) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    pieces, at = [], 0
    while at < len(ids):
        step = rng.choice([0, 1, 1, 1, 2, 5])
        pieces.append(detokenizer.push(ids[at : at + step]))
        at += step
    return [*pieces, detokenizer.finish()]


def test_golden_vectors_cut_anywhere(qwen: Tokenizer, golden: list[dict[str, Any]], seed: int) -> None:
    rng = random.Random(seed)
    for row in golden:
        pieces = streamed(qwen, row["ids"], rng)
        assert "".join(pieces) == qwen.decode(row["ids"])
        # these ids come from text, so no half character may ever show, except one that stands in the text
        assert "".join(pieces).count("\ufffd") == row["text"].count("\ufffd")


@pytest.mark.parametrize("skip", [True, False])
def test_random_ids(qwen: Tokenizer, small: Tokenizer, seed: int, skip: bool) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        for tokenizer in (qwen, small):
            ids = rng.choices(range(tokenizer.vocab_size), k=30)
            pieces = streamed(tokenizer, ids, rng, skip_special_tokens=skip)
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip), ids


def test_random_bytes(small: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    near_utf8 = [0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE4, 0xB8, 0xAD, 0xED, 0xA0, 0xF0, 0x9F, 0x98, 0x80, 0xF4, 0x90, 0xFF]
    for _ in range(2000):
        ids = rng.choices(near_utf8, k=12)
        assert "".join(streamed(small, ids, rng)) == bytes(ids).decode("utf-8", "replace"), ids


def test_a_character_comes_whole_and_as_early_as_it_can(small: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(small)
    assert [detokenizer.push([byte]) for byte in "a\U0001f600".encode()] == ["a", "", "", "", "\U0001f600"]
    assert detokenizer.push([0xE4, 0xB8]) == "" and detokenizer.push([0x41]) == "\ufffdA"
    assert detokenizer.push([0xE4]) == "" and detokenizer.finish() == "\ufffd"
    assert detokenizer.finish() == ""


def test_wrong_id_changes_nothing(small: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(small)
    detokenizer.push([0xC3])
    with pytest.raises(RequestError, match="-5"):
        detokenizer.push([0x41, -5])
    assert detokenizer.push([0xA9]) == "\u00e9"
