"""Random lives of the radix tree against a dictionary of all cached prefixes.

The dictionary knows one block and one time of last use for every prefix of whole blocks; it has no edges, so whatever
the tree splits, merges or keeps in its heap must not show. MINIVLLM_LIVES=N runs N times as many lives.
"""

from __future__ import annotations

import os
from collections import Counter
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from minivllm.cache.radix_tree import RadixNode, RadixTree, token_key
from tests.cache.test_radix_tree import HEAP_SLACK, key_of, num_nodes

TIMES = int(os.environ.get("MINIVLLM_LIVES", "1"))
Place = tuple["str | None", str]
EVENTS = dict.fromkeys(["operations", "splits", "merges", "inserts where others were", "evicted blocks"], 0)

STEMS = ["abcabcabcabc", "abcabacabaab", "aabbaabbaabb", "aaaaaaaaaaaa"]

tails = st.sampled_from(["", "a", "b", "c", "ab", "ba", "abcab"])
texts = st.builds(lambda stem, cut, tail: stem[:cut] + tail, st.sampled_from(STEMS), st.integers(0, 12), tails)
salts = st.sampled_from([None, None, None, "tenant"])


def places(salt: str | None, text: str) -> list[Place]:
    """All beginnings of a text, each of which has a block of its own."""
    return [(salt, text[:n]) for n in range(1, len(text) + 1)]


class Model:
    """Every cached prefix by itself: (salt, text) -> block, when it was last pinned or unpinned, and by how many."""

    def __init__(self) -> None:
        self.blocks: dict[Place, int] = {}
        self.used: dict[Place, int] = {}
        self.num_pins: Counter[Place] = Counter()
        self.pins: list[tuple[RadixNode, str | None, str]] = []
        self.clock = count(1)

    def known(self, salt: str | None, text: str) -> int:
        """Letters of `text` that are cached."""
        return next((n for n in range(len(text), 0, -1) if (salt, text[:n]) in self.blocks), 0)

    def path(self, salt: str | None, text: str) -> list[int]:
        return [self.blocks[place] for place in places(salt, text)]

    def pin(self, node: RadixNode, salt: str | None, text: str) -> None:
        self.pins.append((node, salt, text))
        self.num_pins.update(places(salt, text))

    def unpin(self, index: int) -> tuple[RadixNode, str | None, str]:
        node, salt, text = self.pins.pop(index)
        self.num_pins.subtract(places(salt, text))
        return node, salt, text

    def touch(self, salt: str | None, text: str) -> None:
        self.used.update(dict.fromkeys(places(salt, text), next(self.clock)))

    def evictable(self) -> list[Place]:
        return [place for place in self.blocks if not self.num_pins[place]]

    def evict(self) -> int:
        """The end that was used least recently."""
        inner = {(salt, text[:-1]) for salt, text in self.blocks}
        ends = [place for place in self.evictable() if place not in inner]
        return self.blocks.pop(min(ends, key=self.used.__getitem__))

    def clear(self) -> None:
        self.blocks.clear()
        self.num_pins.clear()
        self.pins.clear()


class TreeLives(RuleBasedStateMachine):
    """Any order of everything a caller may do. A rule that finds nothing to work on does nothing."""

    @initialize(block_size=st.sampled_from([8, 8, 8, 16, 64, 256]))
    def build(self, block_size: int) -> None:
        self.block_size = block_size
        self.tree = RadixTree(block_size)
        self.model = Model()
        self.fresh = count()

    def key(self, text: str) -> bytes:
        return key_of(text, self.block_size)

    @rule(text=texts, salt=salts, rest=st.integers(0, 7))
    def match(self, text: str, salt: str | None, rest: int) -> None:
        tree, model = self.tree, self.model
        node, blocks, num_unpinned = tree.match(self.key(text) + token_key([7] * rest), salt)
        known = text[: model.known(salt, text)]
        assert blocks == model.path(salt, known)
        assert num_unpinned == sum(not model.num_pins[place] for place in places(salt, known))
        assert node is not None or not known
        assert node is None or node.start <= len(known) <= node.end

    @rule(text=texts, salt=salts, fewer=st.sampled_from([0, 0, 0, 1, 2]), more=st.booleans())
    def pin(self, text: str, salt: str | None, fewer: int, more: bool) -> None:
        """What of `text` is cached, or `fewer` blocks of it; `more`: then all that is not cached is inserted."""
        node, blocks, _ = self.tree.match(self.key(text), salt)
        pinned = text[: max(0, len(blocks) - fewer)]
        self.add_pin(node, salt, pinned)
        if more:
            self.insert(-1, text[len(pinned) :], "")

    @rule(which=st.integers(0, 9), fewer=st.integers(0, 3))
    def pin_what_another_has_pinned(self, which: int, fewer: int) -> None:
        if self.model.pins:
            node, salt, text = self.model.pins[which % len(self.model.pins)]
            self.add_pin(node, salt, text[: max(0, len(text) - fewer)])

    def add_pin(self, node: RadixNode | None, salt: str | None, text: str) -> None:
        before = num_nodes(self.tree)
        node = self.tree.pin(node, len(text), salt)
        EVENTS["splits"] += len(text) > 0 and num_nodes(self.tree) > before
        assert node.end == len(text)
        self.model.pin(node, salt, text)
        self.model.touch(salt, text)

    @rule(which=st.integers(0, 9), more=tails, unknown=tails)
    def insert(self, which: int, more: str, unknown: str) -> None:
        """`unknown` are tokens of the key that have no block yet."""
        model = self.model
        if not model.pins:
            return
        index = which % len(model.pins)
        node, salt, begin = model.unpin(index)
        text = begin + more
        own = [*model.path(salt, begin), *(next(self.fresh) for _ in more)]
        blocks = list(own)
        before = model.known(salt, text)
        node, found = self.tree.insert(node, self.key(text + unknown), blocks)
        EVENTS["inserts where others were"] += found > len(begin)
        assert found == before
        assert blocks == model.path(salt, text[:found]) + own[found:]
        assert node.end == len(text)
        for n in range(found + 1, len(text) + 1):
            model.blocks[salt, text[:n]] = own[n - 1]
        model.pin(node, salt, text)

    @rule(which=st.integers(0, 9), times=st.integers(1, 3))
    def unpin(self, which: int, times: int = 1) -> None:
        model = self.model
        for _ in range(min(times, len(model.pins))):
            node, salt, text = model.unpin(which % len(model.pins))
            before = num_nodes(self.tree)
            self.tree.unpin(node)
            model.touch(salt, text)
            EVENTS["merges"] += len(text) > 0 and num_nodes(self.tree) < before

    @rule(number=st.integers(1, 16))
    def evict(self, number: int) -> None:
        number = min(number, self.tree.num_evictable)
        EVENTS["evicted blocks"] += number
        assert Counter(self.tree.evict(number)) == Counter(self.model.evict() for _ in range(number))

    @rule(really=st.sampled_from([False] * 5 + [True]))
    def clear(self, really: bool) -> None:
        if really:
            assert sorted(self.tree.clear()) == sorted(self.model.blocks.values())
            self.model.clear()

    @invariant()
    def tree_is_the_model(self) -> None:
        if not hasattr(self, "tree"):
            return
        tree, model = self.tree, self.model
        EVENTS["operations"] += 1
        assert tree.check([node for node, _, _ in model.pins]) == Counter(model.blocks.values())
        assert tree.num_blocks == len(model.blocks)
        assert tree.num_evictable == len(model.evictable())
        for node, salt, text in model.pins:
            assert node.salt == salt
            assert tree.path(node) == model.path(salt, text)
            assert tree.num_shared(node) == sum(model.num_pins[place] > 1 for place in places(salt, text))
        assert tree._roots.keys() == {salt for salt, _ in model.blocks} | {salt for _, salt, _ in model.pins}
        assert len(tree._leaves._heap) <= 2 * len(tree._leaves) + HEAP_SLACK

    def teardown(self) -> None:
        """Once nobody is left all can be evicted, in the order of use, and nothing remains."""
        if not hasattr(self, "tree"):
            return
        while self.model.pins:
            self.unpin(0)
        while self.model.blocks:
            assert self.tree.evict(1) == [self.model.evict()]
            EVENTS["evicted blocks"] += 1
            self.tree_is_the_model()
        assert num_nodes(self.tree) == 0


TestTreeLives = TreeLives.TestCase
TestTreeLives.settings = settings(
    max_examples=120 * TIMES, stateful_step_count=40, deadline=None, database=None, print_blob=False
)


def test_the_lives_were_full_of_events() -> None:
    """Runs after the lives (pytest keeps the order of a file)."""
    if not EVENTS["operations"]:
        pytest.skip("the random lives were not run")
    print(EVENTS)
    assert EVENTS["operations"] >= 3000 * TIMES
    assert all(number >= 10 * TIMES for number in EVENTS.values()), EVENTS
