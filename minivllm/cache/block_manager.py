"""The scheduler's one face to the KV cache: block tables that share what other requests computed.

Every block has one owner for each table it is in, and one more while the radix tree knows it. A table begins with
blocks that it shares and never writes; where the shared part ends inside a block, that block is copied first (copy on
write). Blocks that only the tree owns are a cache: they are evicted when a table needs room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minivllm.cache.block_pool import BlockPool
from minivllm.cache.radix_tree import RadixNode, RadixTree

Copy = tuple[int, int]  # (source block, target block)
Entry = tuple[int, int]  # (index in the table, block)


class Prefix(NamedTuple):
    """The beginning of a sequence that need not be computed: its first num_tokens tokens lie in `blocks`.

    num_unpinned: how many of the blocks could be evicted now, and cannot once the prefix is used.
    may_commit: whether what follows the prefix may enter the cache.
    """

    num_tokens: int
    blocks: list[int]
    node: RadixNode | None
    num_unpinned: int
    may_commit: bool


@dataclass(slots=True)
class CacheStats:
    """Counters over the cache's life: tokens of prompts, how many of them were found in the cache, and evictions."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    evicted_blocks: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that were found in the cache; 0 before the first prompt."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


@dataclass(slots=True)
class _Owner:
    """node: the end of the part of the table that the tree knows, pinned; None where the tree must not know any."""

    table: list[int]
    node: RadixNode | None


class BlockManager:
    """Block tables over a pool of `num_blocks` blocks of `block_size` tokens.

    An owner is any int that the caller keeps unique among the live ones (the scheduler uses the slot). The token at
    position p of an owner lies in block table[p // block_size], at offset p % block_size. A sequence is given as its
    key (`radix_tree.token_key` of its token ids) and salt: only sequences of the same salt share blocks.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        assert block_size in (8, 16, 32, 64, 128, 256), f"block_size {block_size} is no power of two from 8 to 256"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.stats = CacheStats()
        self._pool = BlockPool(num_blocks)
        self._tree = RadixTree(block_size)
        self._owners: dict[int, _Owner] = {}
        self._num_entries = 0

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole cache holds."""
        return self.num_blocks * self.block_size

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that no table holds but the tree knows; they are given up when room is needed."""
        return self._tree.num_evictable

    @property
    def num_available(self) -> int:
        """Blocks that tables can still take: the free and the cached ones."""
        return self._pool.num_free + self._tree.num_evictable

    @property
    def num_used(self) -> int:
        """Blocks in at least one table."""
        return self.num_blocks - self.num_available

    @property
    def num_entries(self) -> int:
        """Length of all tables together; a shared block counts once for each."""
        return self._num_entries

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, key: bytes, salt: str | None, most_tokens: int) -> Prefix:
        """The longest cached prefix of a sequence, at most `most_tokens` of it. Changes nothing."""
        if not self.prefix_caching:
            return Prefix(0, [], None, 0, False)
        node, blocks, num_unpinned = self._tree.match(key, salt)
        num_tokens = min(len(blocks) * self.block_size, most_tokens)
        num_unpinned -= len(blocks) - num_tokens // self.block_size  # what is not shared as a whole is not pinned
        return Prefix(num_tokens, blocks, node, max(num_unpinned, 0), True)

    def prefix_of(self, owner: int, num_tokens: int) -> Prefix:
        """The first `num_tokens` tokens of a live owner, which it has computed, for another to share."""
        state = self._owners[owner]
        blocks = state.table[: self.blocks_for(num_tokens)]
        return Prefix(num_tokens, blocks, state.node, 0, state.node is not None)

    def open(self, owner: int, prefix: Prefix, salt: str | None) -> list[Copy]:
        """Give `owner` a table that begins with `prefix`; returns the block to copy where that ends inside a block.

        The copy, which takes one available block, must be made before anything is computed for the owner.
        """
        assert owner not in self._owners, f"owner {owner} already has a block table"
        num_shared, rest = divmod(prefix.num_tokens, self.block_size)
        table = prefix.blocks[:num_shared]
        for block in table:
            self._pool.add_ref(block)
        node = self._tree.pin(prefix.node, num_shared, salt) if prefix.may_commit else None
        self._owners[owner] = _Owner(table, node)
        self._num_entries += len(table)
        if not rest:
            return []
        table.append(self._take())
        self._num_entries += 1
        return [(prefix.blocks[num_shared], table[-1])]

    def grow(self, owner: int, num_tokens: int) -> list[Entry]:
        """Make the table of `owner` hold `num_tokens` tokens in all; returns its new entries.

        The caller knows that so many blocks are available.
        """
        table = self._owners[owner].table
        first = len(table)
        table += [self._take() for _ in range(first, self.blocks_for(num_tokens))]
        self._num_entries += len(table) - first
        return list(enumerate(table[first:], first))

    def append(self, owner: int) -> Entry:
        """Make the table of `owner` one block longer, if one is available; returns the new entry."""
        table = self._owners[owner].table
        block = self._take()
        table.append(block)
        self._num_entries += 1
        return len(table) - 1, block

    def commit(self, owner: int, key: bytes, num_tokens: int) -> list[Entry]:
        """Let the tree know the whole blocks of the first `num_tokens` tokens of `owner`, which are computed.

        Where the tree knows a prefix of them from somebody else meanwhile, the table gets the tree's blocks and its own
        are given back; returns these changes of the table.
        """
        state, count = self._owners[owner], num_tokens // self.block_size
        if state.node is None or state.node.end >= count:
            return []
        begin, table = state.node.end, state.table
        blocks = table[:count]
        state.node, known = self._tree.insert(state.node, key, blocks)
        changes = [(index, blocks[index]) for index in range(begin, known) if blocks[index] != table[index]]
        for index, block in changes:
            self._pool.add_ref(block)
            self._pool.give_back(table[index])
            table[index] = block
        for block in blocks[known:]:
            self._pool.add_ref(block)  # the tree is an owner too
        return changes

    def release(self, owner: int) -> None:
        """Give back the blocks of `owner`; it is unknown from now on. What was committed stays cached."""
        state = self._owners.pop(owner)
        if state.node is not None:
            self._tree.unpin(state.node)
        for block in state.table:
            self._pool.give_back(block)
        self._num_entries -= len(state.table)

    def clear(self) -> None:
        """Forget all cached prefixes. Live owners keep their blocks, of which none will be cached."""
        for block in self._tree.clear():
            self._pool.give_back(block)
        for state in self._owners.values():
            state.node = None

    def table(self, owner: int) -> list[int]:
        """A copy of the block table of `owner`."""
        return list(self._owners[owner].table)

    def table_length(self, owner: int) -> int:
        """Number of blocks in the table of `owner`."""
        return len(self._owners[owner].table)

    def begins_with(self, owner: int | None, block: int) -> bool:
        """Whether `block` is the first in the table of `owner`."""
        return owner is not None and self._owners[owner].table[:1] == [block]

    def num_private(self, owner: int, begun: Sequence[int] = ()) -> int:
        """Blocks that become available when `owner` leaves, if another table comes that begins with `begun`."""
        state = self._owners[owner]
        table = state.table
        if state.node is not None:
            shared = self._tree.num_shared(state.node)
        else:  # the tree does not know; whoever shares blocks shares a beginning
            shared = next((i for i, block in enumerate(table) if self._pool.ref_count(block) == 1), len(table))
        while shared < min(len(begun), len(table)) and table[shared] == begun[shared]:
            shared += 1
        return len(table) - shared

    def check(self, owners: Iterable[int]) -> None:
        """Assert every invariant, given who should own blocks now. O(num_blocks); for tests and debugging."""
        assert set(owners) == self._owners.keys(), "owners and block tables differ"
        self._pool.check()
        nodes = [state.node for state in self._owners.values() if state.node is not None]
        references = self._tree.check(nodes)
        cached = len(references) - len(references.keys() & {b for s in self._owners.values() for b in s.table})
        assert cached == self.num_cached, "evictable blocks are in a table, or cached ones cannot be evicted"
        assert all(count == 1 for count in references.values()), "the tree holds a block twice"
        assert self._num_entries == sum(len(state.table) for state in self._owners.values()), "wrong number of entries"
        for state in self._owners.values():
            assert len(set(state.table)) == len(state.table), "a table holds a block twice"
            references.update(state.table)
            if state.node is not None:
                assert self._tree.path(state.node) == state.table[: state.node.end], "a table and its prefix differ"
        counts = Counter({block: self._pool.ref_count(block) for block in range(self.num_blocks)})
        assert references == +counts, "owners and references differ"
        assert self.num_free + self.num_cached + self.num_used == self.num_blocks == self.num_free + len(references)

    def _take(self) -> int:
        if not self._pool.num_free:
            (block,) = self._tree.evict(1)
            self._pool.give_back(block)
            self.stats.evicted_blocks += 1
        return self._pool.take()
