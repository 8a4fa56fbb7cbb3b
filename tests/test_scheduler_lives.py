"""Random lives of scheduler, block pool and radix tree, every invariant checked after every operation.

MINIVLLM_LIVES=N runs N times as many. The worlds are small on purpose: pools that are always full, prompts that share
beginnings, and as much of aborts, deadlines, clears and preemptions as of ordinary life.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minivllm.errors import QueueFullError, RequestError
from minivllm.request import Request
from tests.scheduler_world import World, expect_short_answers

TIMES = int(os.environ.get("MINIVLLM_LIVES", "1"))
OPERATIONS = {"in all": 0, "preemptions": 0, "hits": 0, "copies": 0, "holds": 0, "evictions": 0}
STEMS = [random.Random(stem).choices(range(100, 110), k=80) for stem in range(3)]


def prompt_of(stem: int, shared: int, own: int, key: int) -> list[int]:
    """`shared` tokens that other prompts begin with too, then `own` ones that only few have."""
    return STEMS[stem][:shared] + random.Random(key).choices(range(200, 203), k=own)


class RandomLives(RuleBasedStateMachine):
    """Random pools, prompts, samples, priorities, salts, stops, deadlines, aborts, clears and pipeline depths."""

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        max_num_seqs = data.draw(st.integers(1, 6))
        self.depth = data.draw(st.integers(1, 3))
        self.queue = data.draw(st.one_of(st.none(), st.integers(1, 12)))
        self.world = World(
            num_blocks=data.draw(st.integers(1, 24)),
            max_num_seqs=max_num_seqs,
            budget=max_num_seqs + data.draw(st.integers(0, 40)),
            max_model_len=data.draw(st.integers(2, 120)),
            prefix_caching=data.draw(st.integers(0, 4)) > 0,
            policy=data.draw(st.sampled_from(["fcfs", "priority"])),
            prefix_aware=data.draw(st.booleans()),
            max_num_waiting=self.queue,
        )
        if data.draw(st.booleans()):
            expect_short_answers(self.world.scheduler)

    @rule(
        stem=st.integers(0, 2),
        shared=st.integers(0, 80),
        own=st.integers(0, 20),
        key=st.integers(0, 3),
        max_tokens=st.integers(1, 60),
        stop=st.booleans(),
        n=st.sampled_from([1, 1, 1, 2, 5]),
        priority=st.integers(0, 2),
        salt=st.sampled_from([None, None, None, "tenant"]),
        timeout=st.sampled_from([None, None, None, 3.0, 20.0]),
    )
    def add(
        self, stem: int, shared: int, own: int, key: int, max_tokens: int, stop: bool, n: int, priority: int,
        salt: str | None, timeout: float | None,
    ) -> None:  # fmt: skip
        world, limit = self.world, self.world.limits[2]
        prompt = prompt_of(stem, shared, own, key)
        options = {"prompt": prompt, "stop": stop, "priority": priority, "cache_salt": salt}
        request = world.make(0, max_tokens, n=n, timeout=timeout, **options)
        length, waiting = len(prompt), world.scheduler.num_waiting
        fits = 1 <= length < limit and length + min(max_tokens, limit - length) - 1 <= world.blocks.num_tokens
        if not fits:
            with pytest.raises(RequestError):
                world.scheduler.add([request])
        elif self.queue is not None and waiting and waiting + n > self.queue:
            with pytest.raises(QueueFullError):
                world.scheduler.add([replace(request) for _ in range(n)])
        else:
            world.add_made(request)
            assert request.max_tokens == min(max_tokens, limit - length)

    @rule(count=st.integers(2, 6), stem=st.integers(0, 2), shared=st.integers(0, 60), max_tokens=st.integers(1, 30))
    def add_some_alike(self, count: int, stem: int, shared: int, max_tokens: int) -> None:
        for key in range(count):
            self.add(stem, shared, key, key, max_tokens, True, 1, 0, None, None)

    @precondition(lambda self: self.world.told)
    @rule(data=st.data())
    def abort_any(self, data: st.DataObject) -> None:
        self.world.abort(data.draw(st.sampled_from(self.world.requests)))

    @precondition(lambda self: self.world.scheduler.num_running)
    @rule(data=st.data(), whole=st.booleans())
    def end_running(self, data: st.DataObject, whole: bool) -> None:
        running = [request for request in self.alive() if request.slot is not None]
        request = data.draw(st.sampled_from(running[::-1]))  # the youngest is the likeliest to be in its prompt
        if whole:
            self.world.abort(request)
        else:
            self.world.finish(request)

    @rule()
    def fool_the_forecast(self) -> None:
        expect_short_answers(self.world.scheduler)

    @rule()
    def clear_cache(self) -> None:
        self.world.clear_cache()

    @precondition(lambda self: len(self.world.out) < self.depth)
    @rule()
    def schedule(self) -> None:
        self.world.schedule()

    @precondition(lambda self: self.world.out)
    @rule()
    def update(self) -> None:
        self.world.update()

    @rule(count=st.integers(1, 20))
    def run(self, count: int) -> None:
        for _ in range(count):
            while len(self.world.out) < self.depth and self.world.schedule():
                pass
            if self.world.out:
                self.world.update()

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "world"):
            scheduler = self.world.scheduler
            assert scheduler.num_waiting + scheduler.num_running == len(self.alive())

    def alive(self) -> list[Request]:
        return [request for request in self.world.requests if request.finish_reason is None]

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.drain()
        OPERATIONS["in all"] += self.world.num_operations
        OPERATIONS["copies"] += self.world.runner.num_copies
        OPERATIONS["hits"] += self.world.blocks.stats.cached_tokens > 0
        OPERATIONS["evictions"] += self.world.blocks.stats.evicted_blocks
        for name, _, _ in self.world.events:
            OPERATIONS["preemptions"] += name == "preempted"
            OPERATIONS["holds"] += name == "held"


TestRandomLives = RandomLives.TestCase
TestRandomLives.settings = settings(
    max_examples=700 * TIMES, stateful_step_count=50, deadline=None, database=None, print_blob=False
)


def test_the_lives_were_long_and_full_of_events() -> None:
    """Runs after the lives (pytest keeps the order of a file): what they did was not a walk in the park."""
    if not OPERATIONS["in all"]:
        pytest.skip("the random lives were not run")
    print(OPERATIONS)
    assert OPERATIONS["in all"] >= 100_000 * TIMES
    assert all(count >= 10 for count in OPERATIONS.values()), OPERATIONS
