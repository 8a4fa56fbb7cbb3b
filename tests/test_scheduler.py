"""The scheduler against a fake runner that checks every cell it reads (`scheduler_world.py`), one rule a test.

Random lives are in `test_scheduler_lives.py`.
"""

from __future__ import annotations

import pytest

from minivllm.batch import Batch, BatchResult, SlotParams
from minivllm.errors import RequestError
from minivllm.request import FinishReason, StepOutput
from tests.scheduler_world import ABORT, ERROR, LENGTH, STOP, STOP_ID, World, drawn, expected


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
    assert world.update() == [StepOutput("r0", 0, drawn(0, 0), None)]
    assert world.schedule() == Batch([0], [10], [1], [0], [], [0])
    assert world.update() == [StepOutput("r0", 0, drawn(0, 1), None)]
    assert world.schedule() == Batch([0], [11], [1], [0], [], [0])
    assert world.update() == [StepOutput("r0", 0, drawn(0, 2), LENGTH)]
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
    request.seed, other.seed = key, calm
    world.add_made(request)
    other.request_id = "r1"
    world.add_made(other)
    for _ in range(index + 3):
        world.schedule()
    for _ in range(index):
        assert len(world.update()) == 2
    shown = None if reason is ERROR else token
    assert world.update()[0] == StepOutput(request.request_id, 0, shown, reason)
    assert request.slot is not None, "two batches are still out"
    assert [len(world.update()) for _ in range(2)] == [1, 1], "the other request goes on"
    assert request.slot is None
    world.drain()


def test_a_stop_token_that_is_also_the_last_is_a_stop() -> None:
    key, index = first_key_with(STOP_ID)
    world = World()
    request = world.make(5, index + 1, stop=True)
    request.seed = key
    world.add_made(request)
    for _ in range(index + 1):
        world.schedule()
        told = world.update()
    assert told == [StepOutput(request.request_id, 0, STOP_ID, STOP)]


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
    assert (first.slot, world.blocks.num_available) == (None, 2)
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
    new.request_id, new.index = old.request_id, 1  # another index only for the books of this world
    world.add_made(new)
    assert new.seed == 1
    batch = world.schedule()
    assert batch is not None
    assert (batch.slots, old.slot) == ([1], 0)
    world.drain()
    assert (new.output_token_ids, old.output_token_ids) == (expected(new)[0], [])


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
        world.scheduler.add([request])
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
        world.scheduler.add([twin])
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
        world.scheduler.update(second, BatchResult([1]))
    world = World()
    world.add(4, 5)
    batch = world.scheduler.schedule()
    assert batch is not None
    with pytest.raises(AssertionError, match="2 tokens for 1 rows"):
        world.scheduler.update(batch, BatchResult([1, 2]))


def test_check_sees_a_request_in_two_places() -> None:
    world = World()
    request = world.add(4, 5)
    world.schedule()
    world.scheduler._waiting.push(request)
    with pytest.raises(AssertionError, match="two places"):
        world.scheduler.check()
    world.scheduler._waiting.remove(request)
    world.scheduler._running._free_slots.append(0)
    with pytest.raises(AssertionError, match="held twice"):
        world.scheduler.check()
