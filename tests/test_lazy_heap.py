"""LazyHeap against a sorted list, and the bound on what removed items may leave behind."""

from __future__ import annotations

import random

import pytest

from minivllm.lazy_heap import LazyHeap

SLACK = 64


def drained(heap: LazyHeap) -> list:
    items = []
    while (item := heap.peek()) is not None:
        assert heap.discard(item)
        items.append(item)
    return items


def test_it_agrees_with_a_sorted_list(seed: int) -> None:
    rng = random.Random(seed)
    heap: LazyHeap[int] = LazyHeap()
    model: list[tuple[int, int, int]] = []  # (key, number of the push, item)
    keys = rng.choice([3, 1000])  # few keys: the order of pushes decides; many: the keys do
    for number in range(5000):
        items = {item for _, _, item in model}
        item, action = rng.randrange(300), rng.random()
        if action < 0.45:
            if item not in items:
                key = rng.randrange(keys)
                heap.push(item, key)
                model.append((key, number, item))
        elif action < 0.8:
            assert heap.discard(item) is (item in items)
            model = [entry for entry in model if entry[2] != item]
        elif action < 0.999:
            best = heap.peek()
            assert best == min(model, default=(None, None, None))[2]
            if best is not None and action > 0.9:
                heap.discard(best)
                model = [entry for entry in model if entry[2] != best]
        else:
            heap.clear()
            model.clear()
        assert len(heap) == len(model)
        assert set(heap) == {item for _, _, item in model}
        assert (item in heap) == (item in {item for _, _, item in model})
        assert len(heap._heap) <= 2 * len(model) + SLACK
    assert drained(heap) == [item for _, _, item in sorted(model)]


def test_equal_keys_come_out_in_the_order_they_came_in() -> None:
    items = [object() for _ in range(50)]  # which cannot be compared with each other
    heap: LazyHeap[object] = LazyHeap()
    for item in items:
        heap.push(item, 1)
    heap.discard(items[0])
    heap.push(items[0], 1)
    assert drained(heap) == [*items[1:], items[0]]


@pytest.mark.parametrize("keys", [(5, 1), (1, 5)])
def test_an_item_that_comes_back_has_its_new_key_alone(keys: tuple[int, int]) -> None:
    heap: LazyHeap[str] = LazyHeap()
    heap.push("again", keys[0])
    heap.push("other", 3)
    heap.discard("again")
    assert heap.peek() == "other"
    heap.push("again", keys[1])
    assert drained(heap) == (["again", "other"] if keys[1] < 3 else ["other", "again"])
    assert not heap.discard("again")
    assert heap.peek() is None


def test_dead_entries_never_pile_up(seed: int) -> None:
    """Neither where the removed ones would surface last, nor beside many live ones."""
    rng = random.Random(seed)
    for live in (0, 1, 100):
        heap: LazyHeap[int] = LazyHeap()
        for item in range(live):
            heap.push(item, -item)
        for number in range(5000):
            heap.push(live + number, rng.randrange(10**6))
            assert heap.discard(live + number)
            assert len(heap._heap) <= 2 * live + SLACK
        assert drained(heap) == list(range(live))[::-1]
        assert len(heap._heap) == 0


def test_entries_of_items_that_come_back_do_not_pile_up(seed: int) -> None:
    rng = random.Random(seed)
    heap: LazyHeap[int] = LazyHeap()
    for item in range(20):
        heap.push(item, item)
    for _ in range(2000):
        item = rng.randrange(20)
        heap.discard(item)
        heap.push(item, item)
        assert len(heap._heap) <= 2 * 20 + SLACK
    assert drained(heap) == list(range(20))


def test_clear_forgets_dead_entries_too() -> None:
    heap: LazyHeap[int] = LazyHeap()
    for item in range(10):
        heap.push(item, item)
    heap.discard(0)
    heap.clear()
    assert (len(heap), list(heap), heap.peek(), heap._heap) == (0, [], None, [])
    heap.push(0, 0)
    assert drained(heap) == [0]


def test_pushing_twice_is_caught() -> None:
    heap: LazyHeap[str] = LazyHeap()
    heap.push("a", 1)
    with pytest.raises(AssertionError, match="pushed twice"):
        heap.push("a", 2)


def test_pop_takes_what_peek_has_shown() -> None:
    heap: LazyHeap[str] = LazyHeap()
    for key, item in ((2, "b"), (1, "a"), (3, "c")):
        heap.push(item, key)
    heap.discard("a")
    assert heap.peek() == "b"
    assert heap.pop() == "b"
    assert "b" not in heap
    assert heap.peek() == "c"
