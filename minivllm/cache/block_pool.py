"""Which blocks of the KV cache are free, and how many owners each used one has.

Two flat lists indexed by block id, or used as a stack, make every operation O(1); the last block given back is the
first taken again, as its memory is the likeliest to be in a cache still.
"""

from __future__ import annotations


class BlockPool:
    """Blocks 0 .. num_blocks - 1; a block is free, or used by one owner or more."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: block 0 is taken first
        self._refs = [0] * num_blocks  # block -> number of owners

    @property
    def num_free(self) -> int:
        """Blocks that `take` can still hand out."""
        return len(self._free)

    def take(self) -> int:
        """A free block, which now has one owner. The caller knows that there is one: see `num_free`."""
        assert self._free, f"all {self.num_blocks} blocks are used"
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def add_ref(self, block: int) -> None:
        """One more owner for a used block."""
        assert self._refs[block] > 0, f"block {block} is free; it cannot be shared"
        self._refs[block] += 1

    def give_back(self, block: int) -> None:
        """One owner less; the block is free once it has none."""
        assert self._refs[block] > 0, f"block {block} is given back twice"
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._free.append(block)

    def ref_count(self, block: int) -> int:
        """Number of owners of `block`, 0 where it is free."""
        return self._refs[block]

    def check(self) -> None:
        """Assert that every block is either used or once in the free list. O(num_blocks)."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is in the free list twice"
        unowned = {block for block, refs in enumerate(self._refs) if refs == 0}
        assert min(self._refs) >= 0, "a block has fewer than no owners"
        assert free == unowned, f"free {sorted(free - unowned)} have owners, or lost {sorted(unowned - free)}"
