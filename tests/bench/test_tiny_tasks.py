"""The task generator: answers are right, seeds repeat, and no held-out content ever reaches training."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import tiny_tasks

ALL_KINDS = sorted(tiny_tasks.KINDS)
HELD_OUT_BELOW_100 = [33, 45, 46, 47, 51, 79, 80, 81, 93]


def test_kinds_are_many_and_words_are_distinct() -> None:
    assert len(ALL_KINDS) >= 12
    assert len(set(tiny_tasks.WORDS)) == len(tiny_tasks.WORDS)
    assert len(set(tiny_tasks.NOUNS)) == len(tiny_tasks.NOUNS), "a noun in two categories has two right answers"


def test_opposites_are_symmetric() -> None:
    assert all(tiny_tasks.OPPOSITES[other] == word for word, other in tiny_tasks.OPPOSITES.items())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_training_and_held_out_contents_never_meet(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    train = {tiny_tasks.draw_task(kind, rng, False).content for _ in range(1500)}
    held_out = {tiny_tasks.draw_task(kind, rng, True).content for _ in range(150)}
    assert not train & held_out
    assert not any(tiny_tasks.is_held_out(kind, content) for content in train)


def test_a_tenth_is_held_out_and_the_split_never_changes(seed: int) -> None:
    rng = random.Random(seed)
    share = sum(tiny_tasks.is_held_out("copy", str(rng.random())) for _ in range(5000)) / 5000
    assert 0.08 < share < 0.12
    assert [n for n in range(100) if tiny_tasks.is_held_out("parity", str(n))] == HELD_OUT_BELOW_100


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_phrasing_does_not_move_a_content_across_the_split(kind: str, seed: int) -> None:
    content, phrasings, answer = tiny_tasks.KINDS[kind](random.Random(seed))
    assert len(set(phrasings)) == len(phrasings) >= 2
    assert answer
    assert not any(ask in content for ask in phrasings)


def test_the_same_seed_gives_the_same_dialogues(seed: int) -> None:
    first, second = (random.Random(seed) for _ in range(2))
    assert [tiny_tasks.train_dialogue(first) for _ in range(50)] == [
        tiny_tasks.train_dialogue(second) for _ in range(50)
    ]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_held_out_dialogues_are_distinct_and_end_with_the_answer(kind: str, seed: int) -> None:
    dialogues = tiny_tasks.held_out_dialogues(kind, 50, seed)
    assert len(dialogues) == 50
    for messages in dialogues:
        assert [m["role"] for m in messages[-2:]] == ["user", "assistant"]
        assert messages[0]["role"] in ("system", "user")


def test_asking_for_more_tasks_than_there_are_names_the_number() -> None:
    with pytest.raises(ValueError, match="parity"):
        tiny_tasks.held_out_dialogues("parity", 900, 0)


def _tasks(kind: str, seed: int) -> list[tiny_tasks.Task]:
    rng = random.Random(seed)
    return [tiny_tasks.draw_task(kind, rng, rng.random() < 0.5) for _ in range(100)]


def test_arithmetic_answers_are_right(seed: int) -> None:
    for kind, sign in (("add", 1), ("subtract", -1)):
        for task in _tasks(kind, seed):
            left, right = map(int, task.content.split())
            assert int(task.answer) == left + sign * right


def test_list_answers_are_right(seed: int) -> None:
    for task in _tasks("reverse", seed):
        assert task.answer.split() == task.content.split()[::-1]
    for task in _tasks("count", seed):
        assert int(task.answer) == len(task.content.split())
    for task in _tasks("remove", seed):
        word, *words = task.content.split()
        words.remove(word)
        assert task.answer.split() == words
    for task in _tasks("spell", seed):
        assert task.answer.replace("-", "") == task.content


def test_sorted_answers_are_right(seed: int) -> None:
    for task in _tasks("sort", seed):
        direction, text = task.content.split(" ", 1)
        numbers = sorted(map(int, text.split(", ")), reverse=direction == "down")
        assert task.answer == ", ".join(map(str, numbers))
