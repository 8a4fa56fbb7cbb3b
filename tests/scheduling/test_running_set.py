"""Slots and tables come and go together, the runner is told of every change, and what was computed stays cached."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from minivllm.cache.block_manager import BlockManager
from minivllm.cache.radix_tree import token_key
from minivllm.request import FinishReason, Request
from minivllm.scheduling.flight import Flight
from minivllm.scheduling.running_set import RunningSet, full_key, num_tokens_of, slot_of
from tests.scheduling import make_request

PROMPT = list(range(20))


class Room:
    """A running set over a cache of 20 blocks of 8 tokens."""

    def __init__(self, num_slots: int = 3) -> None:
        self.blocks = BlockManager(20, 8)
        self.running = RunningSet(self.blocks, num_slots)

    def start(self, request: Request) -> Flight:
        """Give it a slot and schedule all that is known of it."""
        flight = Flight()
        self.running.start(flight, request, self.blocks.match(request.key, request.cache_salt, request.num_known - 1))
        flight.add_entries(slot_of(request), self.blocks.grow(slot_of(request), request.num_known))
        request.num_scheduled = request.num_known
        self.running.decoding[slot_of(request)] = request
        return flight

    def decode(self, request: Request, count: int) -> None:
        """`count` more tokens were scheduled and drawn."""
        request.output_token_ids += [50] * count
        request.num_scheduled += count
        self.blocks.grow(slot_of(request), request.num_scheduled)

    def end(self, request: Request, reason: FinishReason | None) -> None:
        request.finish_reason = reason
        self.running.take_out(request)
        self.running.release(slot_of(request), request)

    def check(self, leaving: tuple[tuple[int, Request], ...] = ()) -> None:
        self.running.check(leaving, lambda request: (0, request.arrival_number))


def test_slots_are_given_and_taken_back() -> None:
    room, requests = Room(), [make_request([number]) for number in range(3)]
    for slot, request in enumerate(requests):
        assert room.running.has_free_slot
        room.start(request)
        assert request.slot == slot
        room.check()
    assert not room.running.has_free_slot
    assert room.running.requests() == requests
    room.end(requests[1], FinishReason.STOP)
    assert requests[1].slot is None
    room.check()
    room.start(make_request([9]))
    assert 1 in room.running.decoding
    with pytest.raises(AssertionError, match="has no slot"):
        slot_of(requests[1])


def test_a_start_shares_what_is_cached_and_tells_the_runner() -> None:
    room = Room()
    first, second = make_request(PROMPT), make_request(PROMPT[:16])
    flight = room.start(first)
    assert (flight.batch.block_ids, flight.batch.copy_sources) == ([0, 1, 2], [])
    room.running.computed(first, 20)
    flight = Flight()
    room.running.start(flight, second, room.blocks.match(second.key, None, 15))
    assert second.num_scheduled == 15
    assert (flight.batch.block_slots, flight.batch.block_ids) == ([1, 1], [0, 3])
    assert (flight.batch.copy_sources, flight.batch.copy_targets) == ([1], [3])
    assert [params.slot for params in flight.batch.new_slots] == [1]
    assert list(room.running.computing) == [second]


def test_computing_ends_with_the_last_known_token() -> None:
    room, request = Room(), make_request(PROMPT)
    room.start(request)
    for num_tokens in (5, 8, 19):
        room.running.computed(request, num_tokens)
        assert request in room.running.computing
        assert room.blocks.match(request.key, None, 20).num_tokens == num_tokens // 8 * 8
    room.running.computed(request, 20)
    assert not room.running.computing
    room.running.computed(request, 20)
    room.check()


def test_blocks_that_took_the_place_of_others_are_told_once() -> None:
    room, requests = Room(), [make_request(PROMPT) for _ in range(2)]
    for request in requests:
        room.start(request)
    for request in requests:
        room.running.computed(request, 20)
    room.check()
    flight = Flight()
    room.running.add_changes(flight)
    batch = flight.batch
    assert (batch.block_slots, batch.block_indices, batch.block_ids) == ([1, 1], [0, 1], [0, 1])
    flight = Flight()
    room.running.add_changes(flight)
    assert flight.batch.block_slots == []


def test_changes_of_a_slot_that_was_given_back_are_forgotten() -> None:
    room, requests = Room(), [make_request(PROMPT) for _ in range(3)]
    for request in requests:
        room.start(request)
    for request in requests:
        room.running.computed(request, 20)
    room.end(requests[1], None)
    flight = Flight()
    room.running.add_changes(flight)
    assert flight.batch.block_slots == [2, 2]


def test_who_is_taken_out_keeps_slot_and_blocks_until_released() -> None:
    room, decoding, begun = Room(), make_request(PROMPT), make_request(PROMPT)
    room.start(decoding)
    flight = Flight()
    room.running.start(flight, begun, room.blocks.match(b"", None, 0))
    room.running.prefilling.append(begun)
    room.check()
    assert room.running.requests() == [begun, decoding]
    for request in (decoding, begun):
        room.running.take_out(request)
        assert request not in room.running.computing
    assert room.running.requests() == []
    assert room.blocks.num_used == 3
    room.check(((0, decoding), (1, begun)))
    room.running.release(0, decoding)
    room.running.release(1, begun)
    assert (room.blocks.num_used, room.blocks.num_cached) == (0, 2)
    room.check()


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.ABORT, FinishReason.TIMEOUT, None])
def test_answers_stay_cached(reason: FinishReason | None) -> None:
    room, request = Room(), make_request(PROMPT)
    room.start(request)
    room.decode(request, 5)
    room.end(request, reason)
    assert room.blocks.match(token_key([*PROMPT, *[50] * 5]), None, 25).num_tokens == 24
    assert room.blocks.num_used == 0


def test_tokens_that_were_computed_but_never_drawn_are_not_cached() -> None:
    """A step may compute one token past a stop; nobody knows which."""
    room, request = Room(), make_request(PROMPT)
    room.start(request)
    room.decode(request, 4)
    del request.output_token_ids[-1]
    room.end(request, FinishReason.STOP)
    assert room.blocks.num_cached == 2


def test_nothing_of_a_request_that_went_wrong_is_cached() -> None:
    room, request = Room(), make_request(PROMPT)
    room.start(request)
    room.decode(request, 5)
    room.end(request, FinishReason.ERROR)
    assert (room.blocks.num_cached, room.blocks.num_free) == (0, 20)
    room.check()


def test_full_key_has_every_token_once() -> None:
    request = make_request(PROMPT, output_token_ids=[50, 51])
    assert full_key(request) == token_key([*PROMPT, 50, 51])
    assert num_tokens_of(request) == 22
    request.key, request.num_known = full_key(request), 22
    assert full_key(request) == request.key, "preempted: nothing was drawn since"
    request.output_token_ids.append(52)
    assert full_key(request) == token_key([*PROMPT, 50, 51, 52])


def lose_a_slot(running: RunningSet) -> None:
    running._free_slots.pop()


def free_a_held_slot(running: RunningSet) -> None:
    running._free_slots.append(0)


def confuse_a_request(running: RunningSet) -> None:
    running.decoding[0].slot = 3


def compute_without_a_slot(running: RunningSet) -> None:
    running.computing[make_request([1])] = None


def disorder_the_prompts(running: RunningSet) -> None:
    running.prefilling.reverse()


def schedule_past_the_end(running: RunningSet) -> None:
    running.decoding[0].num_to_schedule = 3


def grow_too_far(running: RunningSet) -> None:
    running._blocks.grow(0, 40)


def forget_a_promise(running: RunningSet) -> None:
    running.admission.closed(running.decoding[0])


def leak_a_block(running: RunningSet) -> None:
    running._blocks._pool.take()


CORRUPTIONS = {
    lose_a_slot: "a slot is lost, or held twice",
    free_a_held_slot: "a slot is lost, or held twice",
    confuse_a_request: "does not know its slot",
    compute_without_a_slot: "who has no slot computes",
    disorder_the_prompts: "out of order",
    schedule_past_the_end: "scheduled past its end",
    grow_too_far: "unfit blocks",
    forget_a_promise: "promises differ",
    leak_a_block: "references differ",
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_check_sees_what_is_wrong(corrupt: Callable[[RunningSet], None]) -> None:
    room = Room(4)
    room.start(make_request(PROMPT))
    for slot in (1, 2):
        room.start(make_request([slot] * 9))
        room.running.prefilling.append(room.running.decoding.pop(slot))
    room.check()
    corrupt(room.running)
    with pytest.raises(AssertionError, match=CORRUPTIONS[corrupt]):
        room.check()
