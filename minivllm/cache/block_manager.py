"""The scheduler's one face to the KV cache: block tables that grow as a request does.

Admission reserves all the blocks that a request can ever need, and `grow` takes them one by one when its tokens reach
them. As promises never exceed what is free, an admitted request always finds its next block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from minivllm.cache.block_pool import BlockPool


class BlockManager:
    """Block tables over a pool of `num_blocks` blocks of `block_size` tokens.

    An owner is any int that the caller keeps unique among the live ones (the scheduler uses the slot). The token at
    position p of an owner lies in block table[p // block_size], at offset p % block_size.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert block_size in (8, 16, 32, 64, 128, 256), f"block_size {block_size} is no power of two from 8 to 256"
        self.block_size = block_size
        self._pool = BlockPool(num_blocks)
        self._tables: dict[int, list[int]] = {}
        self._promised: dict[int, int] = {}  # owner -> blocks it may hold in all
        self._num_outstanding = 0  # blocks promised and not yet taken, over all owners

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole cache holds."""
        return self._pool.num_blocks * self.block_size

    @property
    def num_free(self) -> int:
        """Blocks that no owner holds; some of them may be promised."""
        return self._pool.num_free

    def can_reserve(self, num_tokens: int) -> bool:
        """Whether a new owner could be promised room for `num_tokens` tokens."""
        return self._num_blocks_for(num_tokens) <= self._pool.num_free - self._num_outstanding

    def reserve(self, owner: int, num_tokens: int) -> None:
        """Open an empty block table for `owner` and promise it room for `num_tokens` tokens in all."""
        assert owner not in self._tables, f"owner {owner} already has a block table"
        assert self.can_reserve(num_tokens), f"no room for {num_tokens} more tokens"
        self._tables[owner] = []
        self._promised[owner] = self._num_blocks_for(num_tokens)
        self._num_outstanding += self._promised[owner]

    def grow(self, owner: int, num_tokens: int) -> list[tuple[int, int]]:
        """Make the table of `owner` hold `num_tokens` tokens in all; returns its new (index, block) entries."""
        table = self._tables[owner]
        indices = range(len(table), self._num_blocks_for(num_tokens))
        assert len(table) + len(indices) <= self._promised[owner], f"owner {owner} takes more than it was promised"
        new = [(index, self._pool.take()) for index in indices]
        table.extend(block for _, block in new)
        self._num_outstanding -= len(new)
        return new

    def release(self, owner: int) -> None:
        """Give back the blocks of `owner` and what was promised to it beyond them; it is unknown from now on."""
        table = self._tables.pop(owner)
        self._num_outstanding -= self._promised.pop(owner) - len(table)
        for block in table:
            self._pool.give_back(block)

    def table(self, owner: int) -> list[int]:
        """A copy of the block table of `owner`."""
        return list(self._tables[owner])

    def check(self, owners: Iterable[int]) -> None:
        """Assert every invariant, given who should own blocks now. O(num_blocks); for tests and debugging."""
        self._pool.check()
        assert set(owners) == self._tables.keys() == self._promised.keys(), "owners and block tables differ"
        held = Counter(block for table in self._tables.values() for block in table)
        assert all(self._pool.ref_count(block) == count for block, count in held.items()), (
            "owners and references differ"
        )
        assert len(held) + self._pool.num_free == self._pool.num_blocks, "a used block is in no table"
        left = [self._promised[owner] - len(table) for owner, table in self._tables.items()]
        assert all(count >= 0 for count in left), "a table is longer than what was promised"
        assert sum(left) == self._num_outstanding <= self._pool.num_free, "more is promised than is free"

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
