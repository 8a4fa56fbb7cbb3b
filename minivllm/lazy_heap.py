"""A priority queue that can also lose any item in O(1): removed items stay in the heap until they surface.

The heap is rebuilt when more than half of it is dead, so its memory follows the number of live items.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from itertools import count
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_SLACK = 64  # dead entries that are never worth a rebuild


class LazyHeap(Generic[T]):
    """Distinct items in order of their keys, first in first out among equal keys. push, pop: O(log n) amortised."""

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, T]] = []
        self._tickets: dict[T, int] = {}  # live item -> number of its heap entry
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, item: T) -> bool:
        return item in self._tickets

    def __iter__(self) -> Iterator[T]:
        """The live items, in no order."""
        return iter(self._tickets)

    def push(self, item: T, key: Any) -> None:
        """Add an item that is not in the heap; keys must be comparable with each other."""
        assert item not in self._tickets, "an item is pushed twice"
        ticket = self._tickets[item] = next(self._numbers)
        heapq.heappush(self._heap, (key, ticket, item))

    def peek(self) -> T | None:
        """The item with the smallest key, None where there is none."""
        while self._heap:
            _, ticket, item = self._heap[0]
            if self._tickets.get(item) == ticket:
                return item
            heapq.heappop(self._heap)
        return None

    def pop(self) -> T:
        """Remove and return the item that `peek` has just shown."""
        _, _, item = heapq.heappop(self._heap)
        del self._tickets[item]
        return item

    def discard(self, item: T) -> bool:
        """Remove `item`; False where it is not in the heap."""
        if self._tickets.pop(item, None) is None:
            return False
        if len(self._heap) > 2 * len(self._tickets) + _SLACK:
            self._heap = [entry for entry in self._heap if self._tickets.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
        return True

    def clear(self) -> None:
        """Remove all items."""
        self._heap.clear()
        self._tickets.clear()
