"""The scheduler against a fake runner that checks every cell it reads (`scheduler_world.py`).

A state machine drives both through random lives; the tests after it show one rule each.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from minivllm.batch import Batch, SlotParams
from minivllm.errors import RequestError
from minivllm.request import FinishReason
from minivllm.scheduler import StepOutput
from tests.scheduler_world import ABORT, ERROR, LENGTH, STOP, STOP_ID, World, drawn, expected


class RandomLives(RuleBasedStateMachine):
    """Random pools, prompts, stops, aborts and pipeline depths."""

    @initialize(data=st.data())
    def build(self, data: st.DataObject) -> None:
        max_num_seqs = data.draw(st.integers(1, 6))
        self.depth = data.draw(st.integers(1, 3))
        self.world = World(
            num_blocks=data.draw(st.integers(1, 20)),
            max_num_seqs=max_num_seqs,
            budget=max_num_seqs + data.draw(st.integers(0, 30)),
            max_model_len=data.draw(st.integers(2, 70)),
        )

    @rule(length=st.integers(0, 75), max_tokens=st.integers(1, 40), stop=st.booleans())
    def add(self, length: int, max_tokens: int, stop: bool) -> None:
        limit = self.world.limits[2]
        fits = 1 <= length < limit and length + min(max_tokens, limit - length) - 1 <= self.world.blocks.num_tokens
        if fits:
            request = self.world.add(length, max_tokens, stop=stop)
            assert request.max_tokens == min(max_tokens, limit - length)
        else:
            with pytest.raises(RequestError):
                self.world.scheduler.add(self.world.make(length, max_tokens))

    @rule(length=st.integers(1, 8), max_tokens=st.integers(1, 20), count=st.integers(1, 4))
    def add_some(self, length: int, max_tokens: int, count: int) -> None:
        for _ in range(count):
            self.add(length, max_tokens, stop=True)

    @precondition(lambda self: self.world.told)
    @rule(data=st.data())
    def abort_any(self, data: st.DataObject) -> None:
        self.world.abort(self.world.runner.requests[data.draw(st.integers(0, len(self.world.told) - 1))])

    @precondition(lambda self: self.world.scheduler.num_running)
    @rule(data=st.data())
    def abort_running(self, data: st.DataObject) -> None:
        requests = self.world.runner.requests.values()
        running = [request for request in requests if request.slot is not None and request.finish_reason is None]
        self.world.abort(data.draw(st.sampled_from(running[::-1])))  # the youngest is the likeliest to be in its prompt

    @precondition(lambda self: len(self.world.out) < self.depth)
    @rule()
    def schedule(self) -> None:
        self.world.schedule()

    @precondition(lambda self: self.world.out)
    @rule()
    def update(self) -> None:
        self.world.update()

    @rule(count=st.integers(1, 10))
    def run(self, count: int) -> None:
        for _ in range(count):
            while len(self.world.out) < self.depth and self.world.schedule():
                pass
            if self.world.out:
                self.world.update()

    @invariant()
    def books_agree(self) -> None:
        if hasattr(self, "world"):
            requests = self.world.runner.requests.values()
            scheduler = self.world.scheduler
            assert scheduler.num_waiting + scheduler.num_running == sum(r.finish_reason is None for r in requests)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


TestRandomLives = RandomLives.TestCase
TestRandomLives.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, database=None)


def test_one_request_from_prompt_to_length() -> None:
    world = World()
    world.time = 5.0
    request = world.add(10, 3)
    batch = world.schedule()
    assert batch == Batch(
        slots=[0],
        starts=[0],
        lengths=[10],
        token_counts=[10],
        token_ids=request.prompt_token_ids,
        samples=[0],
        new_slots=[SlotParams(0, 0.5, 0, 0.9, 0.1, 0)],
        block_slots=[0, 0],
        block_indices=[0, 1],
        block_ids=[0, 1],
    )
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (1, 0)
    assert world.update() == [StepOutput("r0", drawn(0, 0), None)]
    assert world.schedule() == Batch([0], [10], [1], [0], [], [0])
    assert world.update() == [StepOutput("r0", drawn(0, 1), None)]
    assert world.schedule() == Batch([0], [11], [1], [0], [], [0])
    assert world.update() == [StepOutput("r0", drawn(0, 2), LENGTH)]
    assert not world.scheduler.has_unfinished
    assert (request.arrival_time, request.first_token_time, request.finish_time) == (5.0, 6.0, 8.0)
    world.drain()


def test_decode_rows_come_before_prompts_and_prompts_share_the_rest() -> None:
    world = World(budget=16)
    world.add(4, 20)
    world.schedule()
    world.add(30, 2)
    world.add(3, 2)
    batch = world.schedule()
    assert batch is not None
    assert (batch.lengths, batch.token_counts, batch.samples) == ([1, 15], [0, 15], [0])
    batch = world.schedule()
    assert batch is not None
    assert (batch.lengths, batch.starts, batch.samples) == ([1, 15], [5, 15], [0, 1]), (
        "the second chunk ends the prompt"
    )
    batch = world.schedule()
    assert batch is not None
    assert (batch.lengths, batch.samples) == ([1, 1, 3], [0, 1, 2])
    world.drain()


def test_steps_overlap_without_knowing_tokens() -> None:
    world = World()
    request = world.add(5, 4)
    starts = []
    while (batch := world.schedule()) is not None:
        starts.append(batch.starts)
    assert starts == [[0], [5], [6], [7]], "all of max_tokens was scheduled, and nothing beyond"
    assert world.scheduler.has_unfinished
    assert request.output_token_ids == []
    assert [world.update()[0].token_id for _ in range(4)] == [drawn(0, i) for i in range(4)]
    world.drain()


def first_key_with(token: int) -> tuple[int, int]:
    """(key, index): the first request that draws `token` within some tokens, but neither first nor last."""
    for key in range(1000):
        tokens = [drawn(key, index) for index in range(6)]
        if token in tokens[1:4] and {-1, STOP_ID} & set(tokens) == {token}:
            return key, tokens.index(token)
    raise LookupError(token)


@pytest.mark.parametrize(("token", "reason"), [(STOP_ID, STOP), (-1, ERROR)])
def test_an_end_in_the_middle_drops_what_was_computed_past_it(token: int, reason: FinishReason) -> None:
    key, index = first_key_with(token)
    calm = next(key for key in range(1000, 2000) if -1 not in [drawn(key, i) for i in range(8)])
    world = World()
    request, other = world.make(5, 8, stop=True), world.make(9, 8)
    request.seed, other.seed, other.request_id = key, calm, "other"
    for one in (request, other):
        world.scheduler.add(one)
        world.runner.requests[one.seed] = one
        world.told[one.request_id] = []
    for _ in range(index + 3):
        world.schedule()
    for _ in range(index):
        assert len(world.update()) == 2
    shown = None if reason is ERROR else token
    assert world.update()[0] == StepOutput(request.request_id, shown, reason)
    assert request.slot is not None, "two batches are still out"
    assert [len(world.update()) for _ in range(2)] == [1, 1], "the other request goes on"
    assert request.slot is None
    world.drain()


def test_a_stop_token_that_is_also_the_last_is_a_stop() -> None:
    key, index = first_key_with(STOP_ID)
    world = World()
    request = world.make(5, index + 1, stop=True)
    request.seed = key
    world.scheduler.add(request)
    world.runner.requests[key] = request
    for _ in range(index + 1):
        world.schedule()
        told = world.scheduler.update(*world.out.popleft())
    assert told == [StepOutput(request.request_id, STOP_ID, STOP)]


def test_abort_of_a_waiting_request_leaves_at_once() -> None:
    world = World(max_num_seqs=1)
    first, second, third = (world.add(4, 3) for _ in range(3))
    world.schedule()
    assert world.abort(second)
    assert not world.abort(second)
    assert world.scheduler.num_waiting == 1
    assert not world.scheduler.abort("nobody")
    world.drain()
    assert not world.abort(first)
    assert third.finish_reason is LENGTH


def test_abort_of_a_running_request_waits_for_its_last_batch() -> None:
    world = World(max_num_seqs=1, num_blocks=2)
    first, second = world.add(8, 8), world.add(8, 8)
    world.schedule()
    world.schedule()
    assert world.abort(first)
    assert (first.finish_reason, first.slot) == (ABORT, 0)
    assert world.schedule() is None, "its slot and blocks may still be written"
    assert world.update() == []
    assert world.schedule() is None
    assert world.update() == []
    assert (first.slot, world.blocks.num_free) == (None, 2)
    assert world.schedule() is not None
    assert second.slot == 0
    world.drain()


def test_abort_in_the_middle_of_a_prompt_and_at_the_last_token() -> None:
    world = World(budget=8)
    chunked, last = world.add(30, 4), world.add(4, 1)
    world.schedule()
    assert world.abort(chunked)
    batch = world.schedule()
    assert batch is not None
    assert (batch.token_ids, last.num_scheduled) == (last.prompt_token_ids, last.num_to_schedule)
    assert world.abort(last)
    assert (world.update(), world.update()) == ([], [])
    assert not world.scheduler.has_unfinished
    world.drain()


def test_an_id_can_be_used_again_while_its_last_owner_is_leaving() -> None:
    world = World()
    old = world.add(5, 9)
    world.schedule()
    world.abort(old)
    new = world.make(6, 2)
    new.request_id = old.request_id
    world.scheduler.add(new)
    world.runner.requests[new.seed] = new
    assert new.seed == 1
    batch = world.schedule()
    assert batch is not None
    assert (batch.slots, old.slot) == ([1], 0)
    while world.scheduler.has_unfinished:
        world.schedule()
        world.update()
    assert (new.output_token_ids, old.output_token_ids) == (expected(new)[0], [])


def test_admission_waits_until_every_token_is_sure_to_fit() -> None:
    world = World(num_blocks=4)  # 32 tokens
    world.add(8, 9)  # 16 tokens: 2 blocks in the end, 1 now
    second = world.add(8, 10)  # 17 tokens: 3 blocks
    small = world.add(1, 1)
    world.schedule()
    assert world.blocks.num_free == 3
    assert (world.scheduler.num_running, second.slot, small.slot) == (1, None, None), "nobody overtakes the head"
    world.drain()


def test_no_more_requests_run_than_there_are_slots() -> None:
    world = World(max_num_seqs=2)
    for _ in range(5):
        world.add(2, 3)
    world.schedule()
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (2, 3)
    world.drain()


@pytest.mark.parametrize(
    ("length", "max_tokens", "message"),
    [
        (0, 5, "has 0 tokens; it must have from 1 to 63"),
        (64, 5, "has 64 tokens; it must have from 1 to 63"),
        (20, 30, "at most 33 together fit"),
        (33, 1, "at most 33 together fit"),
    ],
)
def test_what_can_never_run_is_refused(length: int, max_tokens: int, message: str) -> None:
    world = World(num_blocks=4)
    request = world.make(length, max_tokens)
    with pytest.raises(RequestError, match=message):
        world.scheduler.add(request)
    assert not world.scheduler.has_unfinished
    assert (request.max_tokens, request.num_to_schedule) == (max_tokens, 0)


@pytest.mark.parametrize(("length", "max_tokens"), [(20, 13), (32, 1), (1, 32)])
def test_what_just_fits_runs(length: int, max_tokens: int) -> None:
    world = World(num_blocks=4)
    world.add(length, max_tokens)
    world.drain()


def test_an_id_in_use_is_refused() -> None:
    world = World()
    first = world.add(4, 2)
    twin = world.make(4, 2)
    twin.request_id = first.request_id
    with pytest.raises(RequestError, match="'r0' is in use"):
        world.scheduler.add(twin)
    world.drain()


def test_max_tokens_is_cut_to_the_context_length() -> None:
    world = World(max_model_len=20)
    request = world.add(15, 1000)
    assert request.max_tokens == 5
    world.drain()


def test_results_must_come_back_in_order_and_complete() -> None:
    world = World()
    world.add(4, 5)
    first, second = world.scheduler.schedule(), world.scheduler.schedule()
    assert first is not None
    assert second is not None
    with pytest.raises(AssertionError, match="in the order"):
        world.scheduler.update(second, [1])
    world = World()
    world.add(4, 5)
    batch = world.scheduler.schedule()
    assert batch is not None
    with pytest.raises(AssertionError, match="2 tokens for 1 rows"):
        world.scheduler.update(batch, [1, 2])


def test_check_sees_a_request_in_two_places() -> None:
    world = World()
    request = world.add(4, 5)
    world.schedule()
    world.scheduler._waiting[request.request_id] = request
    with pytest.raises(AssertionError, match="two places"):
        world.scheduler.check()
    del world.scheduler._waiting[request.request_id]
    world.scheduler._free_slots.append(0)
    with pytest.raises(AssertionError, match="held twice"):
        world.scheduler.check()
