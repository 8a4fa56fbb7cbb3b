"""BlockPool against a plain dictionary, and each misuse it must catch."""

from __future__ import annotations

import random

import pytest

from minivllm.cache.block_pool import BlockPool


def test_it_agrees_with_a_dictionary_of_owners(seed: int) -> None:
    rng = random.Random(seed)
    pool, owners = BlockPool(17), dict.fromkeys(range(17), 0)
    for _ in range(2000):
        used = [block for block, count in owners.items() if count]
        action = rng.choice(["take", "add_ref", "give_back"])
        if action == "take" and len(used) < 17:
            block = pool.take()
            assert owners[block] == 0
            owners[block] = 1
        elif used:
            block = rng.choice(used)
            if action == "add_ref":
                pool.add_ref(block)
                owners[block] += 1
            else:
                pool.give_back(block)
                owners[block] -= 1
        pool.check()
        assert pool.num_free == sum(count == 0 for count in owners.values())
        assert [pool.ref_count(block) for block in range(17)] == list(owners.values())


def test_all_blocks_come_out_once() -> None:
    pool = BlockPool(5)
    assert [pool.take() for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(AssertionError, match="all 5 blocks are used"):
        pool.take()


def test_the_last_block_given_back_is_taken_first() -> None:
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(4)]
    pool.give_back(blocks[2])
    pool.give_back(blocks[0])
    assert [pool.take(), pool.take()] == [blocks[0], blocks[2]]


def test_misuse_is_caught() -> None:
    pool = BlockPool(2)
    block = pool.take()
    pool.give_back(block)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give_back(block)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.add_ref(block)
    with pytest.raises(AssertionError, match="a pool of 0 blocks"):
        BlockPool(0)


def test_check_sees_lost_and_doubled_blocks() -> None:
    pool = BlockPool(3)
    pool._free.append(pool._free[0])
    with pytest.raises(AssertionError, match="twice"):
        pool.check()
    pool._free = pool._free[:2]
    with pytest.raises(AssertionError, match="lost"):
        pool.check()
