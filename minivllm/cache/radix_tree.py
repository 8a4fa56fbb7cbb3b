"""Which token prefixes are in the KV cache, and in which blocks: a radix tree whose edges are runs of whole blocks.

A node holds the tokens of its edge as bytes, so that a prompt is compared with a long edge by one memcmp. Users pin the
path to the end of their prefix; what no pin protects is evicted leaf by leaf, the least recently used first, from a
heap of leaves that is kept up to date as pins come and go. The idea of a prefix tree over cached attention states is
RadixAttention's (Zheng et al. 2023, "SGLang", arXiv:2312.07104).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from minivllm.lazy_heap import LazyHeap

_TOKEN_BYTES = array("i").itemsize


def token_key(token_ids: Sequence[int]) -> bytes:
    """The form in which the tree reads tokens."""
    return array("i", token_ids).tobytes()


def common_blocks(edge: bytes, key: bytes, start: int, low: int, most: int, block_bytes: int) -> int:
    """How many whole blocks of `edge` stand in `key` from block `start` on, given that the first `low` do and at most
    `most` can: one comparison where all do, else a bisection."""
    while low < most:
        # The whole first, as it is the likeliest; a half of what is left once that failed.
        if key.startswith(edge[low * block_bytes : most * block_bytes], (start + low) * block_bytes):
            return most
        middle = (low + most) // 2
        if key.startswith(edge[low * block_bytes : middle * block_bytes], (start + low) * block_bytes):
            low, most = middle, most - 1
        else:
            most = middle - 1
    return low


class RadixNode:
    """An edge of the tree and the place it leads to.

    key: tokens of the edge. blocks: their blocks. start: blocks of the prefix before this edge.
    pins: users whose prefix ends here or below. last_used: tick of the last pin or unpin on the path through here.
    """

    __slots__ = ("blocks", "children", "key", "last_used", "parent", "pins", "salt", "start")

    def __init__(self, parent: RadixNode | None, key: bytes, blocks: list[int], start: int, salt: str | None) -> None:
        self.parent = parent
        self.key = key
        self.blocks = blocks
        self.start = start
        self.salt = salt
        self.children: dict[bytes, RadixNode] = {}  # first block of the child's key -> child
        self.pins = 0
        self.last_used = 0

    @property
    def end(self) -> int:
        """Blocks of the whole prefix up to here."""
        return self.start + len(self.blocks)


class Match(NamedTuple):
    """The longest cached prefix of a key: its blocks, the node it ends in, and how many blocks nobody has pinned."""

    node: RadixNode | None
    blocks: list[int]
    num_unpinned: int


class RadixTree:
    """Token prefixes of whole blocks, apart for each salt. Blocks are only names here: the caller counts references."""

    def __init__(self, block_size: int) -> None:
        self.num_blocks = 0
        self.num_evictable = 0  # blocks of nodes without pins
        self._block_bytes = block_size * _TOKEN_BYTES
        self._roots: dict[str | None, RadixNode] = {}
        self._leaves: LazyHeap[RadixNode] = LazyHeap()  # those without pins, by last use
        self._tick = 0

    def match(self, key: bytes, salt: str | None) -> Match:
        """The longest prefix of `key` that is cached. Changes nothing; time linear in the length of the prefix."""
        node = self._roots.get(salt)
        blocks: list[int] = []
        unpinned = begin = 0
        while node is not None:
            child = node.children.get(key[begin : begin + self._block_bytes])
            if child is None:
                break
            node, known = child, len(blocks)
            if key.startswith(child.key, begin):
                blocks += child.blocks
                begin += len(child.key)
            else:
                blocks += child.blocks[: self._common(child, key, len(key) // self._block_bytes)]
                begin = len(key)
            if not child.pins:
                unpinned += len(blocks) - known
        return Match(node, blocks, unpinned)

    def pin(self, node: RadixNode | None, num_blocks: int, salt: str | None) -> RadixNode:
        """Protect the first `num_blocks` blocks of the path to `node`; returns the node where they end."""
        if node is None or num_blocks == 0:
            node = self._roots.setdefault(salt, RadixNode(None, b"", [], 0, salt))
        assert node.end >= num_blocks, f"{num_blocks} blocks of a prefix are to be pinned, but {node.end} are known"
        while node.start >= num_blocks and node.parent is not None:
            node = node.parent
        if node.end > num_blocks:
            node = self._split(node, num_blocks - node.start)
        self._tick += 1
        for above in _upwards(node):
            self._add_pin(above)
            above.last_used = self._tick
        return node

    def unpin(self, node: RadixNode) -> None:
        """Take back one `pin` that returned `node`, or the `insert` that followed it."""
        self._tick += 1
        for above in _upwards(node):
            above.pins -= 1
            above.last_used = self._tick
            if not above.pins:
                self.num_evictable += len(above.blocks)
        if node.parent is None:
            self._drop_if_unused(node)
            return
        if not node.pins and not node.children:
            self._leaves.push(node, node.last_used)
        # All of the path was used just now: what no pin keeps apart becomes one edge.
        for above in list(_upwards(node))[1:]:
            self._try_merge(above)

    def insert(self, node: RadixNode, key: bytes, blocks: list[int]) -> tuple[RadixNode, int]:
        """Move the pin from `node`, which ends a prefix of `key`, to the end of all of `blocks`, one for each block of
        the key.

        Returns the new node, and the number of blocks up to which the prefix was cached already: of these, `blocks`
        gets the tree's own in place of the caller's.
        """
        total = len(blocks)
        found = node.end
        while found < total:
            child = self._child(node, key, found)
            if child is None:
                break
            common = self._common(child, key, total)
            if common < len(child.blocks):
                child = self._split(child, common)
            blocks[found : found + common] = child.blocks
            self._add_pin(child)
            node, found = child, found + common
        if found < total:
            node = self._append(node, key[found * self._block_bytes : total * self._block_bytes], blocks[found:])
        return node, found

    def evict(self, count: int) -> list[int]:
        """Forget `count` of the evictable blocks, the ends of the least recently used prefixes; returns them."""
        assert count <= self.num_evictable, f"{count} blocks are to be evicted, but only {self.num_evictable} can be"
        evicted: list[int] = []
        while len(evicted) < count:
            leaf = self._leaves.peek()
            assert leaf is not None, "evictable blocks without a leaf"
            keep = max(0, len(leaf.blocks) - (count - len(evicted)))
            evicted += leaf.blocks[keep:]
            del leaf.blocks[keep:]
            if keep:
                leaf.key = leaf.key[: keep * self._block_bytes]
            else:
                self._remove(self._leaves.pop())
        self.num_blocks -= count
        self.num_evictable -= count
        return evicted

    def clear(self) -> list[int]:
        """Forget everything, pinned or not; returns all blocks. Nodes that were handed out are void."""
        blocks = [block for node in self._nodes() for block in node.blocks]
        self._roots.clear()
        self._leaves.clear()
        self.num_blocks = self.num_evictable = 0
        return blocks

    def path(self, node: RadixNode) -> list[int]:
        """All blocks of the prefix that ends in `node`."""
        parts = [above.blocks for above in _upwards(node)]
        return [block for part in reversed(parts) for block in part]

    def num_shared(self, node: RadixNode) -> int:
        """Blocks of the prefix that ends in pinned `node` which other pins protect too."""
        above: RadixNode | None = node
        while above is not None and above.pins == 1:
            above = above.parent
        return 0 if above is None else above.end

    def check(self, pinned: Iterable[RadixNode]) -> Counter[int]:
        """Assert every invariant, given the pinned nodes; returns how often the tree holds each block. O(size)."""
        nodes, ends = list(self._nodes()), Counter(pinned)
        for node in nodes:
            assert len(node.key) == len(node.blocks) * self._block_bytes, "an edge's tokens and blocks differ"
            assert bool(node.blocks) == (node.parent is not None), "an edge is empty, or a root is not"
            assert node.pins == ends.pop(node, 0) + sum(child.pins for child in node.children.values()), "wrong pins"
            assert node.parent is not None or node.children or node.pins, "a root without use"
            for first, child in node.children.items():
                assert child.parent is node, "a child does not know its parent"
                assert child.key.startswith(first) and len(first) == self._block_bytes, "a child under a wrong name"
                assert child.start == node.end, "a child starts where its parent does not end"
                assert child.last_used <= node.last_used or node.parent is None, "a path was used beyond its beginning"
        assert not ends, "a pinned node is not in the tree"
        leaves = {node for node in nodes if not node.pins and not node.children and node.parent is not None}
        assert leaves == set(self._leaves), "the heap of leaves is wrong"
        assert self.num_blocks == sum(len(node.blocks) for node in nodes), "wrong number of blocks"
        assert self.num_evictable == sum(len(node.blocks) for node in nodes if not node.pins), "wrong evictable blocks"
        return Counter(block for node in nodes for block in node.blocks)

    def _child(self, node: RadixNode, key: bytes, block: int) -> RadixNode | None:
        return node.children.get(key[block * self._block_bytes : (block + 1) * self._block_bytes])

    def _common(self, child: RadixNode, key: bytes, total: int) -> int:
        """How many blocks of `child`, of which the first is known to, agree with the first `total` blocks of `key`."""
        most = min(len(child.blocks), total - child.start)
        return common_blocks(child.key, key, child.start, 1, most, self._block_bytes)

    def _add_pin(self, node: RadixNode) -> None:
        if not node.pins:
            self.num_evictable -= len(node.blocks)
            if not node.children:
                self._leaves.discard(node)
        node.pins += 1

    def _append(self, node: RadixNode, key: bytes, blocks: list[int]) -> RadixNode:
        """Put new blocks behind `node`, whose pin moves to their end."""
        self.num_blocks += len(blocks)
        if node.parent is not None and node.pins == 1 and not node.children:  # nobody else ends here: one longer edge
            node.key += key
            node.blocks += blocks
            return node
        child = RadixNode(node, key, list(blocks), node.end, node.salt)
        child.pins, child.last_used = 1, node.last_used
        node.children[key[: self._block_bytes]] = child
        return child

    def _split(self, node: RadixNode, count: int) -> RadixNode:
        """Cut an edge after `count` blocks; returns its upper part. `node` stays the lower one, with its users."""
        cut, parent = count * self._block_bytes, node.parent
        assert parent is not None, "a root has no edge"
        upper = RadixNode(parent, node.key[:cut], node.blocks[:count], node.start, node.salt)
        upper.pins, upper.last_used = node.pins, node.last_used
        parent.children[self._name(node)] = upper
        node.key, node.blocks, node.start, node.parent = node.key[cut:], node.blocks[count:], upper.end, upper
        upper.children[self._name(node)] = node
        return upper

    def _try_merge(self, node: RadixNode) -> None:
        """Make `node` and its only child one edge where no user ends between them and both were used together."""
        if len(node.children) != 1 or node.parent is None:
            return
        (child,) = node.children.values()
        if child.pins != node.pins or child.last_used != node.last_used:
            return
        child.key, child.blocks, child.start = node.key + child.key, node.blocks + child.blocks, node.start
        child.parent = node.parent
        node.parent.children[self._name(node)] = child
        node.parent = None

    def _remove(self, leaf: RadixNode) -> None:
        """Take a leaf without blocks out of the tree."""
        parent = leaf.parent
        assert parent is not None, "a root is no leaf"
        del parent.children[self._name(leaf)]
        leaf.parent = None
        if parent.parent is None:
            self._drop_if_unused(parent)
        elif not parent.children and not parent.pins:
            self._leaves.push(parent, parent.last_used)
        else:
            self._try_merge(parent)

    def _drop_if_unused(self, root: RadixNode) -> None:
        if not root.children and not root.pins:
            del self._roots[root.salt]

    def _name(self, node: RadixNode) -> bytes:
        return node.key[: self._block_bytes]

    def _nodes(self) -> Iterator[RadixNode]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()


def _upwards(node: RadixNode) -> Iterator[RadixNode]:
    above: RadixNode | None = node
    while above is not None:
        yield above
        above = above.parent
