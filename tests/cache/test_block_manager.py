"""BlockManager: tables grow by exactly the blocks that are needed, promises hold, and `check` sees what is wrong."""

from __future__ import annotations

import random

import pytest

from minivllm.cache.block_manager import BlockManager


def test_grow_returns_only_what_is_new() -> None:
    manager = BlockManager(8, 16)
    manager.reserve(5, 64)
    assert manager.grow(5, 1) == [(0, 0)]
    assert manager.grow(5, 16) == []
    assert manager.grow(5, 49) == [(1, 1), (2, 2), (3, 3)]
    assert manager.grow(5, 64) == []
    assert manager.table(5) == [0, 1, 2, 3]
    manager.check([5])


def test_promises_count_before_blocks_are_taken() -> None:
    manager = BlockManager(4, 8)
    assert manager.num_tokens == 32
    assert manager.can_reserve(32)
    assert not manager.can_reserve(33)
    manager.reserve(0, 17)  # 3 blocks
    assert manager.num_free == 4
    assert manager.can_reserve(8)
    assert not manager.can_reserve(9)
    manager.grow(0, 17)
    assert manager.num_free == 1
    assert manager.can_reserve(8)
    assert not manager.can_reserve(9)
    manager.release(0)
    assert manager.can_reserve(32)
    manager.check([])


def test_release_gives_back_a_promise_that_was_not_used() -> None:
    manager = BlockManager(4, 8)
    manager.reserve(1, 32)
    manager.grow(1, 9)
    manager.release(1)
    manager.check([])
    manager.reserve(2, 32)
    assert len(manager.grow(2, 32)) == 4


def test_random_owners_never_share_and_never_run_short(seed: int) -> None:
    rng = random.Random(seed)
    manager, sizes, limits = BlockManager(30, 8), {}, {}
    for owner in range(300):
        limit = rng.randrange(1, 100)
        if manager.can_reserve(limit):
            manager.reserve(owner, limit)
            sizes[owner], limits[owner] = 0, limit
        for other in list(sizes):
            sizes[other] = rng.randint(sizes[other], limits[other])
            before = manager.table(other)
            new = manager.grow(other, sizes[other])
            assert manager.table(other) == before + [block for _, block in new]
            assert [index for index, _ in new] == list(range(len(before), len(before) + len(new)))
            assert len(manager.table(other)) == (sizes[other] + 7) // 8
            if rng.random() < 0.2:
                manager.release(other)
                del sizes[other]
        manager.check(sizes)


def test_misuse_is_caught() -> None:
    manager = BlockManager(4, 8)
    manager.reserve(0, 16)
    with pytest.raises(AssertionError, match="already has"):
        manager.reserve(0, 8)
    with pytest.raises(AssertionError, match="no room"):
        manager.reserve(1, 24)
    with pytest.raises(AssertionError, match="more than it was promised"):
        manager.grow(0, 17)
    for size in (0, 1, 4, 12, 512):
        with pytest.raises(AssertionError, match="no power of two"):
            BlockManager(4, size)


def test_check_sees_what_is_wrong() -> None:
    manager = BlockManager(8, 8)
    manager.reserve(0, 32)
    manager.grow(0, 20)
    with pytest.raises(AssertionError, match="owners and block tables differ"):
        manager.check([0, 1])
    with pytest.raises(AssertionError, match="owners and block tables differ"):
        manager.check([])
    manager._tables[0][1] = manager._tables[0][0]
    with pytest.raises(AssertionError, match="owners and references differ"):
        manager.check([0])
    manager._tables[0] = manager._tables[0][2:]
    with pytest.raises(AssertionError, match="in no table"):
        manager.check([0])
    leaky = BlockManager(8, 8)
    leaky.reserve(0, 32)
    leaky._num_outstanding = 3
    with pytest.raises(AssertionError, match="more is promised"):
        leaky.check([0])
