"""Requests that have no slot: in order of urgency, or held back until a running request has computed what they share.

A held request stands outside of the order, behind the one it waits for; when that one has got further, those behind it
are woken, take their old places in the order and are looked at anew.
"""

from __future__ import annotations

from minivllm.config import POLICIES
from minivllm.lazy_heap import LazyHeap
from minivllm.request import Request


class WaitingQueue:
    """The most urgent request first. A request that was here before keeps its place by its arrival_number."""

    def __init__(self, policy: str) -> None:
        assert policy in POLICIES, f"policy {policy!r} is none of {POLICIES}"
        self._by_priority = policy == "priority"
        self._ready: LazyHeap[Request] = LazyHeap()
        self._held: dict[Request, Request] = {}  # request -> the one it waits for
        self._followers: dict[Request, list[Request]] = {}

    def __len__(self) -> int:
        return len(self._ready) + len(self._held)

    def __contains__(self, request: Request) -> bool:
        return request in self._ready or request in self._held

    def requests(self) -> list[Request]:
        """All of them, in no order."""
        return [*self._ready, *self._held]

    def urgency(self, request: Request) -> tuple[int, int]:
        """Smaller runs first; no two requests are equal."""
        return (request.priority if self._by_priority else 0, request.arrival_number)

    def push(self, request: Request) -> None:
        """Put `request` in its place in the order."""
        self._ready.push(request, self.urgency(request))

    def peek(self) -> Request | None:
        """The most urgent request that is not held."""
        return self._ready.peek()

    def hold(self, request: Request, leader: Request) -> None:
        """Set `request`, in the order or new, aside until `wake(leader)`."""
        self._ready.discard(request)
        self._held[request] = leader
        self._followers.setdefault(leader, []).append(request)

    def wake(self, leader: Request) -> None:
        """Put all that wait for `leader` back into the order."""
        for request in self._followers.pop(leader, ()):
            if self._held.get(request) is leader:
                del self._held[request]
                self.push(request)

    def remove(self, request: Request) -> None:
        """Take `request` out, wherever it is."""
        if not self._ready.discard(request):
            leader = self._held.pop(request)
            followers = self._followers[leader]
            followers.remove(request)
            if not followers:
                del self._followers[leader]

    def check(self) -> None:
        """Assert that the held ones and those they wait for agree."""
        followers = {request: leader for leader, group in self._followers.items() for request in group}
        assert followers == self._held, "a held request waits for nobody, or for two"
        assert all(self._followers.values()), "nobody waits for a leader"
        assert not any(request in self._ready for request in self._held), "a request is held and ready"
