"""Edited logits against a plain formula over the token history, while slots come, go, are reused and are preempted."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from minivllm.batch import Batch, SlotExtras, SlotParams
from minivllm.runner.logits_editor import LogitsEditor
from tests.runner.driver import edited, random_wants

VOCAB, SLOTS = 23, 6
CPU = torch.device("cpu")
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@dataclass(eq=False)
class Life:
    tokens: list[int]
    num_prompt: int
    wants: dict[str, Any]

    def extras(self, slot: int) -> SlotExtras:
        return SlotExtras(slot=slot, num_prompt_tokens=self.num_prompt, token_ids=list(self.tokens), **self.wants)


def new_life(rng: random.Random) -> Life:
    num_prompt = rng.randint(1, 6)
    return Life(rng.choices(range(VOCAB), k=num_prompt), num_prompt, random_wants(rng, VOCAB))


def enter(batch: Batch, slot: int, life: Life) -> None:
    batch.new_slots.append(SlotParams(slot, 1.0, 0, 1.0, 0.0, 0))
    if life.wants:
        batch.new_extras.append(life.extras(slot))


def decode(lives: dict[int, Life], slots: list[int], batch: Batch) -> Batch:
    batch.slots = slots
    batch.starts = [len(lives[slot].tokens) - 1 for slot in slots]
    batch.lengths = [1] * len(slots)
    batch.token_counts = [0] * len(slots)
    batch.samples = list(range(len(slots)))
    return batch


@pytest.mark.parametrize("device", DEVICES)
def test_every_edit_against_a_plain_formula(device: str, seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    editor = LogitsEditor(VOCAB, torch.device(device))
    lives: dict[int, Life] = {}
    num_edited = 0
    for _ in range(120):
        batch = Batch()
        for slot in range(SLOTS):
            if slot not in lives or rng.random() < 0.05:
                lives[slot] = new_life(rng)
                enter(batch, slot, lives[slot])
        if rng.random() < 0.1:  # two change places: preempted, and back with all of their tokens
            one, two = rng.sample(range(SLOTS), 2)
            lives[one], lives[two] = lives[two], lives[one]
            for slot in (one, two):
                batch.new_slots = [params for params in batch.new_slots if params.slot != slot]
                batch.new_extras = [extras for extras in batch.new_extras if extras.slot != slot]
                enter(batch, slot, lives[slot])
        slots = rng.sample(range(SLOTS), rng.randint(1, SLOTS))
        plan = editor.begin(decode(lives, slots, batch))
        logits = torch.randn(len(slots), VOCAB) * 4
        rows = zip(logits.tolist(), slots, strict=True)
        expected = torch.tensor([edited(row, lives[slot].extras(slot), lives[slot].tokens) for row, slot in rows])
        ids = [rng.choice([*range(VOCAB), *range(4), -1]) for _ in slots]
        if plan is None:
            assert torch.equal(expected, logits)
        else:
            num_edited += not torch.equal(expected, logits)
            got = editor.edit(plan, logits.to(device))
            torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=1e-5)
            editor.drawn(plan, torch.tensor(ids, device=device))
        for slot, token in zip(slots, ids, strict=True):
            lives[slot].tokens.append(token)
            if token < 0:  # a failed draw ends its request
                del lives[slot]
    assert num_edited > 60


def test_a_long_bad_word_beside_a_short_one(seed: int) -> None:
    """The table of last tokens grows under the slot that came first."""
    rng = random.Random(seed)
    editor = LogitsEditor(VOCAB, CPU)
    long = tuple(rng.choices(range(VOCAB), k=300))
    lives = {
        0: Life([3], 1, {"bad_words": ((3, 4), (3, 3, 3, 5))}),
        1: Life(list(long[:-2]), 5, {"bad_words": (long, long[5:])}),
    }
    expected = [{4}, {4}, {4, 5}, {4, 5}], [None, set(), {long[-1]}, set()]
    for step in range(4):
        batch = Batch()
        if step < 2:
            enter(batch, step, lives[step])
        slots = [0] if step == 0 else [1, 0]
        plan = editor.begin(decode(lives, slots, batch))
        assert plan is not None
        logits = editor.edit(plan, torch.zeros(len(slots), VOCAB))
        for row, slot in zip(logits, slots, strict=True):
            assert edited_ids(row) == expected[slot][step]
        drawn = {0: 3, 1: long[-2] if step == 1 else 0}
        editor.drawn(plan, torch.tensor([drawn[slot] for slot in slots]))
        for slot in slots:
            lives[slot].tokens.append(drawn[slot])


def edited_ids(row: torch.Tensor) -> set[int]:
    return set((row != 0).nonzero().flatten().tolist())


def test_nothing_is_planned_where_nothing_is_edited() -> None:
    editor = LogitsEditor(VOCAB, CPU)
    plain, told = Life([1, 2], 2, {}), Life([1, 2], 2, {"logprobs": 3})
    waiting = Life([1, 2], 2, {"min_tokens": 2, "stop_ids": (7,)})
    lives = {0: plain, 1: told, 2: waiting}
    batch = Batch()
    for slot, life in lives.items():
        enter(batch, slot, life)
    assert editor.begin(decode(lives, [0, 1], batch)) is None
    for _ in range(2):
        plan = editor.begin(decode(lives, [0, 2, 1], Batch()))
        assert plan is not None
        assert edited_ids(editor.edit(plan, torch.zeros(3, VOCAB)).flatten()) == {VOCAB + 7}
        waiting.tokens.append(5)
    assert editor.begin(decode(lives, [0, 2, 1], Batch())) is None  # min_tokens is reached


def test_a_slot_that_was_given_to_another_holds_no_memory() -> None:
    editor = LogitsEditor(VOCAB, CPU)
    wants = {"presence_penalty": 1.0, "bad_words": ((1, 2, 3),)}
    for _ in range(20):
        for slot in range(3):
            batch = Batch()
            enter(batch, slot, Life([1, 2], 2, wants))
            editor.begin(batch)
    assert editor._counts.data.shape == (4, VOCAB)
    assert editor._tails.data.shape == (4, 2)
    batch = Batch()
    for slot in range(3):
        enter(batch, slot, Life([1, 2], 2, {}))
    assert editor.begin(decode({slot: Life([1, 2], 2, {}) for slot in range(3)}, [0, 1, 2], batch)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_edited_in_float32(dtype: torch.dtype) -> None:
    editor = LogitsEditor(VOCAB, CPU)
    life = Life([1], 1, {"logit_bias": ((2, 0.001),)})
    batch = Batch()
    enter(batch, 0, life)
    plan = editor.begin(decode({0: life}, [0], batch))
    assert plan is not None
    logits = torch.full((1, VOCAB), 16.0, dtype=dtype)
    got = editor.edit(plan, logits)
    assert got.dtype == torch.float32
    assert got[0].argmax() == 2
    assert (logits == 16).all()
