"""BlockManager by example: what tables share, copy, give back and evict, what it counts, and what `check` sees."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from minivllm.cache.block_manager import BlockManager, CacheStats, Prefix
from minivllm.cache.radix_tree import token_key

BLOCK_SIZES = [8, 16, 32, 64, 128, 256]


def serve(manager: BlockManager, owner: int, tokens: list[int], salt: str | None = None, computed: int | None = None):
    """Open, grow and commit as a request does that is computed up to `computed`; returns its prefix and its copies."""
    prefix = manager.match(token_key(tokens), salt, len(tokens) - 1)
    copies = manager.open(owner, prefix, salt)
    computed = len(tokens) if computed is None else computed
    manager.grow(owner, computed)
    manager.commit(owner, token_key(tokens), computed)
    return prefix, copies


def counts(manager: BlockManager) -> tuple[int, int, int]:
    return manager.num_free, manager.num_cached, manager.num_used


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_grow_returns_only_what_is_new(block_size: int) -> None:
    manager = BlockManager(8, block_size)
    assert manager.num_tokens == 8 * block_size
    assert manager.open(5, manager.match(b"", None, 0), None) == []
    assert manager.grow(5, 0) == []
    assert manager.grow(5, 1) == [(0, 0)]
    assert manager.grow(5, block_size) == []
    assert manager.grow(5, 3 * block_size + 1) == [(1, 1), (2, 2), (3, 3)]
    assert manager.grow(5, 4 * block_size) == []
    assert manager.table(5) == [0, 1, 2, 3]
    assert manager.table_length(5) == manager.num_entries == 4
    assert counts(manager) == (4, 0, 4)
    manager.check([5])


def test_a_table_is_a_copy() -> None:
    manager = BlockManager(4, 8)
    serve(manager, 0, list(range(9)))
    manager.table(0).clear()
    assert manager.table_length(0) == 2
    manager.check([0])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_what_was_computed_is_shared_by_whole_blocks(block_size: int) -> None:
    manager = BlockManager(12, block_size)
    prompt = list(range(3 * block_size + 5))
    serve(manager, 0, prompt)
    prefix, copies = serve(manager, 1, [*prompt[: 2 * block_size + 3], 10**6, 10**6])
    assert (prefix.num_tokens, prefix.blocks, copies) == (2 * block_size, [0, 1], [])
    assert manager.table(1)[:2] == manager.table(0)[:2]
    assert manager.table(1)[2] != manager.table(0)[2]
    assert counts(manager) == (7, 0, 5)
    assert (manager.num_private(0), manager.num_private(1)) == (2, 1)
    manager.check([0, 1])
    manager.release(0)
    assert counts(manager) == (8, 1, 3), "the whole block is cached, the last part of one is free"
    manager.release(1)
    assert counts(manager) == (9, 3, 0)
    manager.check([])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_at_a_full_hit_the_last_block_is_copied_for_its_last_token(block_size: int) -> None:
    manager = BlockManager(8, block_size)
    prompt = list(range(2 * block_size))
    serve(manager, 0, prompt)
    prefix, copies = serve(manager, 1, prompt, computed=2 * block_size - 1)
    assert prefix.num_tokens == 2 * block_size - 1
    assert copies == [(1, 2)]
    assert manager.table(1) == [0, 2]
    manager.check([0, 1])
    assert manager.commit(1, token_key(prompt), 2 * block_size) == [(1, 1)], "once whole, it is the cached one again"
    assert manager.table(1) == [0, 1]
    assert counts(manager) == (6, 0, 2)
    manager.check([0, 1])


def test_a_copy_may_take_the_place_of_its_source() -> None:
    """The cache is full and the source is the only block that can be evicted: the copy is from itself to itself."""
    manager = BlockManager(3, 8)
    prompt = list(range(16))
    serve(manager, 0, prompt)
    manager.release(0)
    serve(manager, 1, [99] * 8)
    assert counts(manager) == (0, 2, 1)
    prefix, copies = serve(manager, 2, prompt, computed=15)
    assert (prefix.num_tokens, prefix.num_unpinned) == (15, 1)
    [(source, target)] = copies
    assert source == target == prefix.blocks[1]
    assert manager.stats.evicted_blocks == 1
    manager.check([1, 2])


def test_num_unpinned_is_what_opening_takes_from_the_available() -> None:
    manager = BlockManager(10, 8)
    prompt = list(range(40))
    serve(manager, 0, prompt[:17])
    serve(manager, 1, prompt)
    manager.release(1)
    assert counts(manager) == (4, 3, 3)
    for most, unpinned in ((0, 0), (16, 0), (23, 0), (24, 1), (39, 2), (40, 3)):
        prefix = manager.match(token_key(prompt), None, most)
        assert (prefix.num_tokens, prefix.num_unpinned) == (most, unpinned)
        available = manager.num_available
        manager.open(7, prefix, None)
        assert available - manager.num_available == unpinned + bool(most % 8)
        manager.check([0, 7])
        manager.release(7)


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 5, 8, 16, 20])
def test_samples_share_the_table_of_their_leader(num_tokens: int, prefix_caching: bool) -> None:
    manager = BlockManager(12, 8, prefix_caching=prefix_caching)
    prompt = list(range(21))
    serve(manager, 0, prompt)
    for owner in (1, 2):
        copies = manager.open(owner, manager.prefix_of(0, num_tokens), None)
        whole, rest = divmod(num_tokens, 8)
        assert manager.table(owner)[:whole] == [0, 1, 2][:whole]
        assert [source for source, _ in copies] == ([whole] if rest else [])
        assert manager.table_length(owner) == whole + bool(rest)
    assert manager.num_used == 3 + 2 * bool(num_tokens % 8)
    manager.check([0, 1, 2])
    manager.release(0)
    for owner in (1, 2):
        manager.grow(owner, 21)
        manager.commit(owner, token_key(prompt), 21)
    manager.check([1, 2])
    assert manager.table(1)[:2] == manager.table(2)[:2] or not prefix_caching
    manager.release(1)
    manager.release(2)
    assert counts(manager) == ((10, 2, 0) if prefix_caching else (12, 0, 0))


def test_two_that_computed_the_same_end_up_with_one_copy() -> None:
    manager = BlockManager(10, 8)
    prompt, key = list(range(20)), token_key(list(range(20)))
    for owner in (0, 1):
        manager.open(owner, manager.match(key, None, 19), None)
        manager.grow(owner, 20)
    assert manager.commit(0, key, 8) == []
    assert manager.commit(1, key, 20) == [(0, 0)]
    assert manager.commit(0, key, 20) == [(1, manager.table(1)[1])]
    assert manager.table(0)[:2] == manager.table(1)[:2]
    assert manager.table(0)[2] != manager.table(1)[2]
    assert counts(manager) == (6, 0, 4)
    assert manager.num_entries == 6
    manager.check([0, 1])
    assert manager.match(token_key([*prompt, 1]), None, 21).num_tokens == 16
    assert manager.commit(1, key, 8) == [], "what is known already changes nothing"
    manager.check([0, 1])


def test_the_least_recently_used_prefix_is_evicted_first_and_only_when_nothing_is_free() -> None:
    manager = BlockManager(6, 8)
    old, new = [1] * 16, [2] * 16
    for owner, tokens in enumerate((old, new)):
        serve(manager, owner, tokens)
        manager.release(owner)
    serve(manager, 2, [3] * 8, computed=0)
    assert [block for _, block in manager.grow(2, 16)] == [4, 5]
    assert manager.stats.evicted_blocks == 0
    assert manager.grow(2, 24) == [(2, 1)], "the end of the old one"
    assert manager.match(token_key(old), None, 16).num_tokens == 8
    manager.grow(2, 40)
    assert manager.match(token_key(old), None, 16).num_tokens == 0
    assert manager.match(token_key(new), None, 16).num_tokens == 8
    assert manager.stats.evicted_blocks == 3
    assert counts(manager) == (0, 1, 5)
    manager.check([2])


def test_salts_are_kept_apart() -> None:
    manager = BlockManager(9, 8)
    prompt = list(range(20))
    for owner, salt in enumerate((None, "a", "b")):
        assert serve(manager, owner, prompt, salt)[0].num_tokens == 0
    assert len({block for owner in range(3) for block in manager.table(owner)}) == 9
    manager.check([0, 1, 2])
    for owner in range(3):
        manager.release(owner)
    assert serve(manager, 3, prompt, "b")[0].blocks == [6, 7]


def test_without_prefix_caching_nothing_is_kept() -> None:
    manager = BlockManager(6, 8, prefix_caching=False)
    prompt = list(range(20))
    for owner in (0, 1):
        assert serve(manager, owner, prompt) == (Prefix(0, [], None, 0, False), [])
    assert manager.commit(0, token_key(prompt), 20) == []
    manager.check([0, 1])
    assert (manager.num_private(0), manager.num_cached) == (3, 0)
    manager.release(0)
    manager.release(1)
    assert counts(manager) == (6, 0, 0)
    manager.check([])


def test_clear_under_load() -> None:
    manager = BlockManager(12, 8)
    prompt = list(range(24))
    serve(manager, 0, prompt)
    serve(manager, 1, [5] * 16)
    manager.release(1)
    manager.clear()
    assert counts(manager) == (9, 0, 3)
    manager.check([0])
    manager.grow(0, 25)
    assert manager.commit(0, token_key([*prompt, 1]), 25) == []
    assert manager.match(token_key(prompt), None, 24).num_tokens == 0, "what runs through a clear is not cached"
    sample = manager.prefix_of(0, 20)
    assert not sample.may_commit
    assert len(manager.open(2, sample, None)) == 1
    manager.check([0, 2])
    serve(manager, 3, prompt)
    manager.check([0, 2, 3])
    assert manager.match(token_key(prompt), None, 24).blocks == manager.table(3)
    for owner in (0, 2, 3):
        manager.release(owner)
    assert counts(manager) == (9, 3, 0)
    manager.check([])


def test_generated_tokens_are_cached_for_the_next_turn(seed: int) -> None:
    rng = random.Random(seed)
    manager, tokens = BlockManager(20, 8), list(range(10))
    for turn in range(4):
        prefix, _ = serve(manager, turn, tokens)
        assert prefix.num_tokens == (len(tokens) - 3) // 8 * 8 * (turn > 0)
        for _ in range(15):
            tokens = [*tokens, rng.randrange(1000)]
            manager.grow(turn, len(tokens))
        manager.commit(turn, token_key(tokens), len(tokens))
        manager.release(turn)
        tokens = [*tokens, 1, 2, 3]
        manager.check([])


# Without the tree (prefix caching off, or after a clear) num_private takes every block of a table for private, so the
# forecast expects the blocks that samples share back once for each of them. The blocks with one reference are private.
@pytest.mark.parametrize("cleared", [False, True])
def test_what_samples_share_without_the_tree_is_not_private(cleared: bool) -> None:
    manager = BlockManager(12, 8, prefix_caching=cleared)
    serve(manager, 0, list(range(21)))
    manager.clear()
    manager.open(1, manager.prefix_of(0, 20), None)
    assert (manager.num_private(0), manager.num_private(1)) == (1, 1)
    manager.release(0)
    assert manager.num_private(1) == 3


def test_hit_rate() -> None:
    assert CacheStats().hit_rate == 0
    assert CacheStats(prompt_tokens=8, cached_tokens=6).hit_rate == 0.75


def test_nothing_grows_however_many_come(seed: int) -> None:
    rng = random.Random(seed)
    manager = BlockManager(40, 8)
    for owner in range(2000):
        serve(manager, owner, rng.choices(range(2), k=rng.randint(1, 60)), rng.choice([None, str(owner % 3)]))
        manager.release(owner)
    manager.check([])
    assert len(manager._tree._leaves._heap) <= 2 * 40 + 64
    assert manager.num_entries == len(manager._owners) == 0


def test_misuse_is_caught() -> None:
    manager = BlockManager(4, 8)
    serve(manager, 0, list(range(16)))
    with pytest.raises(AssertionError, match="owner 0 already has a block table"):
        manager.open(0, manager.match(b"", None, 0), None)
    with pytest.raises(AssertionError, match="only 0 can be"):
        manager.grow(0, 33)
    for size in (0, 1, 4, 12, 512):
        with pytest.raises(AssertionError, match="no power of two"):
            BlockManager(4, size)


def double_an_entry(manager: BlockManager) -> None:
    manager._owners[1].table[1] = manager._owners[1].table[0]


def point_elsewhere(manager: BlockManager) -> None:
    manager._owners[0].table[-1] = manager._owners[1].table[-1]


def lose_an_entry(manager: BlockManager) -> None:
    manager._owners[1].table.pop()


def lose_an_entry_and_its_count(manager: BlockManager) -> None:
    manager._owners[1].table.pop()
    manager._num_entries -= 1


def share_what_the_tree_calls_evictable(manager: BlockManager) -> None:
    block = manager.match(token_key([7] * 8), None, 8).blocks[0]
    manager._owners[1].table.append(block)
    manager._pool.add_ref(block)
    manager._num_entries += 1


def swap_in_another_block(manager: BlockManager) -> None:
    table = manager._owners[0].table
    table[0], table[2] = table[2], table[0]


def leak_a_block(manager: BlockManager) -> None:
    manager._pool.take()


def add_a_reference(manager: BlockManager) -> None:
    manager._pool.add_ref(0)


def free_a_used_block(manager: BlockManager) -> None:
    manager._pool._refs[0] = 0


def let_the_tree_hold_a_block_twice(manager: BlockManager) -> None:
    node = manager._owners[0].node
    node.blocks[0] = node.blocks[1]


def forget_a_pin(manager: BlockManager) -> None:
    manager._tree.unpin(manager._owners[0].node)


def forget_the_node(manager: BlockManager) -> None:
    manager._owners[0].node = None


CORRUPTIONS = {
    double_an_entry: "a table holds a block twice",
    point_elsewhere: "owners and references differ",
    lose_an_entry: "wrong number of entries",
    lose_an_entry_and_its_count: "owners and references differ",
    share_what_the_tree_calls_evictable: "evictable blocks are in a table",
    swap_in_another_block: "a table and its prefix differ",
    leak_a_block: "owners and references differ",
    add_a_reference: "owners and references differ",
    free_a_used_block: "lost",
    let_the_tree_hold_a_block_twice: "the tree holds a block twice",
    forget_a_pin: "wrong pins",
    forget_the_node: "wrong pins",
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_check_sees_what_is_wrong(corrupt: Callable[[BlockManager], None]) -> None:
    manager = BlockManager(12, 8)
    serve(manager, 2, [7] * 8)
    manager.release(2)
    serve(manager, 0, list(range(20)))
    serve(manager, 1, list(range(100, 112)))
    manager.check([0, 1])
    corrupt(manager)
    with pytest.raises(AssertionError, match=CORRUPTIONS[corrupt]):
        manager.check([0, 1])


@pytest.mark.parametrize("owners", [[], [0, 1]])
def test_check_sees_owners_that_differ(owners: list[int]) -> None:
    manager = BlockManager(4, 8)
    serve(manager, 0, list(range(9)))
    with pytest.raises(AssertionError, match="owners and block tables differ"):
        manager.check(owners)
