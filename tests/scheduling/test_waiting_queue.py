"""The waiting queue against two plain dictionaries, and each way in and out of it."""

from __future__ import annotations

import random

import pytest

from minivllm.request import Request
from minivllm.scheduling.waiting_queue import WaitingQueue
from tests.scheduling import make_request


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_it_agrees_with_a_model(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    queue = WaitingQueue(policy)
    ready: set[Request] = set()
    held: dict[Request, Request] = {}
    running = [make_request([1]) for _ in range(4)]

    def urgency(request: Request) -> tuple[int, int]:
        return (request.priority if policy == "priority" else 0, request.arrival_number)

    gone: list[Request] = []
    for _ in range(1000):
        action = rng.choice(["new", "new", "old", "hold", "hold new", "wake", "remove", "start"])
        everybody = sorted([*ready, *held], key=urgency)
        if action == "new":
            request = make_request([1], priority=rng.randint(-1, 2))
            queue.push(request)
            ready.add(request)
        elif action == "old" and gone:
            request = gone.pop(rng.randrange(len(gone)))
            queue.push(request)
            ready.add(request)
        elif action == "hold" and ready:
            request, leader = min(ready, key=urgency), rng.choice(running)
            queue.hold(request, leader)
            ready.remove(request)
            held[request] = leader
        elif action == "hold new":
            request, leader = make_request([1]), rng.choice(running)
            queue.hold(request, leader)
            held[request] = leader
        elif action == "wake":
            leader = rng.choice(running)
            queue.wake(leader)
            woken = {request for request, other in held.items() if other is leader}
            ready |= woken
            held = {request: other for request, other in held.items() if request not in woken}
        elif action == "remove" and everybody:
            request = rng.choice(everybody)
            queue.remove(request)
            ready.discard(request)
            held.pop(request, None)
        elif action == "start" and ready:
            request = queue.peek()
            assert request is not None
            queue.remove(request)
            ready.remove(request)
            gone.append(request)
        assert queue.peek() is min(ready, key=urgency, default=None)
        assert len(queue) == len(ready) + len(held)
        assert set(queue.requests()) == ready | held.keys()
        assert all(request in queue for request in queue.requests())
        assert not any(request in queue for request in gone)
        assert queue._followers.keys() == set(held.values()), "whom nobody waits for is forgotten"
        queue.check()


def test_priority_counts_only_where_the_policy_says_so() -> None:
    later, urgent = make_request([1], priority=5), make_request([1], priority=-5)
    for policy, expected in (("fcfs", later), ("priority", urgent)):
        queue = WaitingQueue(policy)
        queue.push(later)
        queue.push(urgent)
        assert queue.peek() is expected
    with pytest.raises(AssertionError, match="is none of"):
        WaitingQueue("lifo")


def test_who_was_here_before_keeps_his_place() -> None:
    queue, requests = WaitingQueue("fcfs"), [make_request([1]) for _ in range(3)]
    for request in requests:
        queue.push(request)
    queue.remove(requests[0])
    queue.push(requests[0])
    assert queue.peek() is requests[0]
    queue.hold(requests[0], requests[1])
    assert queue.peek() is requests[1]
    queue.wake(requests[1])
    assert queue.peek() is requests[0]


def test_waking_whom_nobody_waits_for_changes_nothing() -> None:
    queue, request = WaitingQueue("fcfs"), make_request([1])
    queue.wake(request)
    assert (len(queue), queue.peek(), queue.requests()) == (0, None, [])
    queue.check()


def test_removing_who_is_not_there_is_caught() -> None:
    with pytest.raises(KeyError):
        WaitingQueue("fcfs").remove(make_request([1]))


def test_check_sees_what_is_wrong() -> None:
    for wrong in ("waits for nobody, or for two", "held and ready", "nobody waits for a leader"):
        queue, leader, request = WaitingQueue("fcfs"), make_request([1]), make_request([1])
        queue.hold(request, leader)
        queue.check()
        if wrong == "held and ready":
            queue.push(request)
        elif wrong == "nobody waits for a leader":
            queue._followers[request] = []
        else:
            del queue._held[request]
        with pytest.raises(AssertionError, match=wrong):
            queue.check()
