"""Stop strings: the same end as a search of the whole text, for every way of cutting it, and nothing held in vain."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import pytest

from minivllm.text import IncrementalDetokenizer, Tokenizer
from minivllm.text.stop import StopStrings


def first_match(text: str, stops: Sequence[str], begin: int = 0) -> tuple[int, str] | None:
    """(index behind it, match) of the first stop string that is complete in `text` behind `begin`; the longest of
    equals."""
    for end in range(begin + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


def expected(text: str, stops: Sequence[str], include: bool, begin: int = 0) -> tuple[str, str | None]:
    match = first_match(text, stops, begin)
    if match is None:
        return text, None
    end, stop = match
    return text[: end if include else end - len(stop)], stop


def may_become_a_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string without being all of it."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if n <= len(text) and text.endswith(stop[:n])), default=0
    )


def pieces_of(text: str, cuts: Iterable[int]) -> list[str]:
    borders = [0, *cuts, len(text)]
    return [text[begin:end] for begin, end in itertools.pairwise(borders)]


def random_stops(rng: random.Random) -> list[str]:
    return ["".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 4))]


@pytest.mark.parametrize("include", [False, True])
def test_every_way_of_cutting_gives_what_a_whole_search_gives(seed: int, include: bool) -> None:
    rng = random.Random(seed)
    for _ in range(60):
        stops, text = random_stops(rng), "".join(rng.choices("abc", weights=[4, 4, 1], k=8))
        for mask in range(1 << (len(text) - 1)):
            cuts = [index + 1 for index in range(len(text) - 1) if mask >> index & 1]
            stopper = StopStrings(stops, include=include)
            given = "".join([stopper.push(piece) for piece in pieces_of(text, cuts)]) + stopper.finish()
            assert (given, stopper.matched) == expected(text, stops, include), (text, stops, cuts)


def test_nothing_is_held_back_that_cannot_become_a_stop_string(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        stops, text = random_stops(rng), "".join(rng.choices("abc", k=20))
        stopper, given = StopStrings(stops), ""
        for index, character in enumerate(text):
            given += stopper.push(character)
            if stopper.matched is not None:
                break
            read = text[: index + 1]
            assert given == read[: len(read) - may_become_a_stop(read, stops)], (text, stops)


def test_a_string_that_is_complete_too_early_is_text(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        stops, text = random_stops(rng), "".join(rng.choices("ab", k=15))
        begin = rng.randint(0, 15)
        stopper = StopStrings(stops)
        given = stopper.push(text[:begin], may_stop=False)
        assert stopper.matched is None
        given += "".join([stopper.push(character) for character in text[begin:]]) + stopper.finish()
        assert (given, stopper.matched) == expected(text, stops, False, begin), (text, stops, begin)


def test_after_a_match_nothing_comes() -> None:
    stopper = StopStrings(["xy", "b"])
    assert [stopper.push(piece) for piece in ("ax", "xb", "more")] == ["a", "xx", ""]
    assert stopper.finish() == ""
    assert stopper.matched == "b"


def test_what_is_held_back_comes_at_the_end() -> None:
    stopper = StopStrings(["<end>"])
    assert stopper.push("a <en") == "a "
    assert stopper.push("d") == ""
    assert stopper.finish() == "<end"
    assert stopper.finish() == ""


def test_no_strings_hold_nothing() -> None:
    stopper = StopStrings([])
    assert stopper.push("abc") == "abc"
    assert stopper.finish() == ""


def test_characters_cut_between_tokens(small: Tokenizer, seed: int) -> None:
    """The ids below 256 of this tokenizer are bytes, so that every character of more than one is cut."""
    rng = random.Random(seed)
    letters = "a\u00e9\u00ea\u4e2d\u4e2e\U0001f600\U0001f601"
    for _ in range(300):
        text = "".join(rng.choices(letters, k=12))
        stops = ["".join(rng.choices(letters, k=rng.randint(1, 2))) for _ in range(2)]
        detokenizer, stopper, given = IncrementalDetokenizer(small), StopStrings(stops), ""
        for byte in text.encode():
            given += stopper.push(detokenizer.push([byte]))
        given += stopper.push(detokenizer.finish()) + stopper.finish()
        assert (given, stopper.matched) == expected(text, stops, False), (text, stops)


class Counted(str):
    """A string that counts how often a character of it is looked at."""

    looks = 0

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        Counted.looks += 1
        return super().__getitem__(index)


def test_the_worst_strings_and_texts_take_linear_time() -> None:
    """64 strings of 1,000 characters that fail at their last one, over and over."""
    stops = [Counted("a" * 999 + chr(0x100 + index)) for index in range(64)]
    stopper, length, before = StopStrings(stops), 5_000, Counted.looks
    for _ in range(0, length, 5):
        stopper.push("aaaaa")
    assert stopper.finish() == "a" * 999
    assert Counted.looks - before <= 64 * (3 * length + 2 * 1000)
