"""Random lives of the block manager against a model of owners and of what stands in every block.

A cell of the modelled KV cache holds a name of the whole sequence up to its token, salt included, so a table that
shares a wrong block, shares it too early or lets somebody write to it is found out. MINIVLLM_LIVES=N runs N times as
many.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from minivllm.cache.block_manager import BlockManager, Prefix
from minivllm.cache.radix_tree import token_key

TIMES = int(os.environ.get("MINIVLLM_LIVES", "1"))
EVENTS = dict.fromkeys(["operations", "copies", "hits", "shared with a live owner", "re-pointed", "evicted"], 0)

STEMS = [[1] * 100, [1, 2] * 50, [1] * 20 + [2] * 80]
sequences = st.builds(
    lambda stem, cut, tail: stem[:cut] + tail,
    st.sampled_from(STEMS),
    st.sampled_from([1, 7, 8, 9, 16, 20, 31, 32, 33, 50, 64, 99]),
    st.sampled_from([[], [3], [3] * 9, [1, 2, 3] * 4]),
)
salts = st.sampled_from([None, None, None, "tenant"])
answers = st.sampled_from([[], [1], [2], [1, 2, 3], [2] * 20])
which = st.integers(0, 9)


class Names:
    """A number for every sequence of tokens and salt: equal for equal ones alone."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[object, int], int] = {}

    def of(self, salt: str | None, tokens: list[int]) -> list[int]:
        """The names of all beginnings of `tokens`."""
        names: list[int] = []
        last: object = salt
        for token in tokens:
            last = self._numbers.setdefault((last, token), len(self._numbers))
            names.append(last)
        return names


@dataclass
class Owner:
    """names: of the sequence up to each token. computed: tokens. committed: whole blocks that the tree knows."""

    name: int
    salt: str | None
    tokens: list[int]
    names: list[int]
    computed: int
    committed: int
    may_commit: bool


class ManagerLives(RuleBasedStateMachine):
    """Owners come, compute, let others share, and leave, in a cache that is too small for them."""

    @initialize(
        num_blocks=st.sampled_from([1, 5, 16, 24, 24, 40]),
        block_size=st.sampled_from([8, 8, 8, 16, 32]),
        prefix_caching=st.sampled_from([True, True, True, False]),
    )
    def build(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.manager = BlockManager(num_blocks, block_size, prefix_caching=prefix_caching)
        self.owners: list[Owner] = []
        self.cells = {block: [-1] * block_size for block in range(num_blocks)}  # the name that stands in each
        self.names = Names()
        self.num_opened = 0

    @rule(tokens=sequences, salt=salts, least=st.integers(0, 3), go_on=st.sampled_from([True, True, False]))
    def open_cached(self, tokens: list[int], salt: str | None, least: int, go_on: bool) -> None:
        """The last `least` tokens are left to compute, as the scheduler leaves the last one."""
        manager, size = self.manager, self.manager.block_size
        most = max(0, len(tokens) - least)
        prefix = manager.match(token_key(tokens), salt, most)
        assert prefix.num_tokens <= most
        assert prefix.num_tokens in (most, size * len(prefix.blocks)), "as much as is known and allowed"
        assert prefix.may_commit == manager.prefix_caching
        if not manager.prefix_caching:
            assert prefix == Prefix(0, [], None, 0, False)
        EVENTS["hits"] += prefix.num_tokens > 0
        if self.open(prefix, tokens, salt) and go_on:
            self.compute(-1, len(tokens), [], True)

    @rule(which=which, own=st.integers(0, 30), fewer=st.integers(0, 20), tail=st.sampled_from([[], [1], [3, 3]]))
    def open_beside(self, which: int, own: int, fewer: int, tail: list[int]) -> None:
        """Share the table of a live owner, up to any token of its that is computed and, in whole blocks, committed."""
        if not self.owners:
            return
        other, size = self.owners[which % len(self.owners)], self.manager.block_size
        most = min(other.computed, (other.committed + 1) * size - 1) if other.may_commit else other.computed
        num_tokens = max(0, most - fewer)
        prefix = self.manager.prefix_of(other.name, num_tokens)
        assert (prefix.num_tokens, prefix.num_unpinned, prefix.may_commit) == (num_tokens, 0, other.may_commit)
        tokens = other.tokens[: num_tokens + own] + tail
        if tokens and self.open(prefix, tokens, other.salt):
            EVENTS["shared with a live owner"] += num_tokens >= size

    def open(self, prefix: Prefix, tokens: list[int], salt: str | None) -> bool:
        """False where there is no room for the copy; then somebody leaves."""
        manager, size = self.manager, self.manager.block_size
        num_shared, rest = divmod(prefix.num_tokens, size)
        available = manager.num_available
        if available - prefix.num_unpinned < bool(rest):
            self.release(0)
            return False
        name, self.num_opened = self.num_opened, self.num_opened + 1
        copies = manager.open(name, prefix, salt)
        table = manager.table(name)
        assert table[:num_shared] == prefix.blocks[:num_shared]
        assert len(table) == manager.blocks_for(prefix.num_tokens)
        assert manager.num_available == available - prefix.num_unpinned - bool(rest)
        assert copies == ([(prefix.blocks[num_shared], table[-1])] if rest else []), "only a part of a block is copied"
        for source, target in copies:
            self.cells[target] = list(self.cells[source])
        EVENTS["copies"] += len(copies)
        may_commit = prefix.may_commit
        names, committed = self.names.of(salt, tokens), num_shared * may_commit
        self.owners.append(Owner(name, salt, tokens, names, prefix.num_tokens, committed, may_commit))
        return True

    @rule(which=which, more=st.integers(1, 40), answer=answers, commit=st.booleans())
    def compute(self, which: int, more: int, answer: list[int], commit: bool) -> None:
        """As many of the next `more` tokens as there are blocks for; `answer` are new tokens at the end."""
        if not self.owners:
            return
        manager, owner = self.manager, self.owners[which % len(self.owners)]
        size, before = manager.block_size, manager.table(owner.name)
        owner.tokens = owner.tokens + answer
        owner.names = self.names.of(owner.salt, owner.tokens)
        room = (len(before) + manager.num_available) * size
        stop = min(owner.computed + more, len(owner.tokens), room)
        num_free, evicted = manager.num_free, manager.stats.evicted_blocks
        entries = manager.grow(owner.name, stop)
        table = manager.table(owner.name)
        assert table == before + [block for _, block in entries]
        assert [index for index, _ in entries] == list(range(len(before), manager.blocks_for(stop)))
        evicted = manager.stats.evicted_blocks - evicted
        assert evicted == max(0, len(entries) - num_free), "nothing is evicted while a block is free"
        EVENTS["evicted"] += evicted
        others = {block for other in self.owners if other is not owner for block in manager.table(other.name)}
        assert others.isdisjoint(table[owner.computed // size :]), "a shared block is written"
        for position in range(owner.computed, stop):
            self.cells[table[position // size]][position % size] = owner.names[position]
        owner.computed = stop
        if commit:
            self.commit(which, 0, False)
        if not manager.num_available:
            self.release(which + 1)

    @rule(tokens=sequences, salt=salts)
    def race(self, tokens: list[int], salt: str | None) -> None:
        """Two compute the same at the same time, as neither was known when the other began."""
        names = self.num_opened, self.num_opened + 1
        for _ in names:
            if self.open(self.manager.match(b"", salt, 0), tokens, salt):
                self.compute(-1, len(tokens), [], False)
        for index, owner in enumerate(self.owners):
            if owner.name in names:
                self.commit(index, 0, False)

    @rule(which=which, fewer=st.sampled_from([0, 0, 0, 1, 9]), unknown=st.booleans())
    def commit(self, which: int, fewer: int, unknown: bool) -> None:
        """`unknown`: the key ends where the committed tokens end, not where the sequence does."""
        if not self.owners:
            return
        manager, owner = self.manager, self.owners[which % len(self.owners)]
        num_tokens = max(0, owner.computed - fewer)
        before, num_used = manager.table(owner.name), manager.num_used
        changes = manager.commit(owner.name, token_key(owner.tokens[: num_tokens if unknown else None]), num_tokens)
        count = num_tokens // manager.block_size
        table = manager.table(owner.name)
        assert dict(changes) == {index: table[index] for index in range(len(table)) if table[index] != before[index]}
        assert all(owner.committed <= index < count for index, _ in changes)
        assert manager.num_used <= num_used
        EVENTS["re-pointed"] += bool(changes)
        if owner.may_commit:
            owner.committed = max(owner.committed, count)
        else:
            assert changes == []

    @rule(which=which)
    def release(self, which: int) -> None:
        if self.owners:
            owner = self.owners.pop(which % len(self.owners))
            others = {block for other in self.owners for block in self.manager.table(other.name)}
            own = set(self.manager.table(owner.name)) - others
            available = self.manager.num_available
            if owner.may_commit:
                assert self.manager.num_private(owner.name) == len(own)
            self.manager.release(owner.name)
            assert self.manager.num_available == available + len(own)

    @rule(really=st.sampled_from([False] * 5 + [True]))
    def clear(self, really: bool) -> None:
        if really:
            self.manager.clear()
            assert self.manager.num_cached == 0
            for owner in self.owners:
                owner.may_commit, owner.committed = False, 0

    @invariant()
    def everybody_reads_his_own(self) -> None:
        if not hasattr(self, "manager"):
            return
        EVENTS["operations"] += 1
        manager, size = self.manager, self.manager.block_size
        manager.check([owner.name for owner in self.owners])
        tables = {owner.name: manager.table(owner.name) for owner in self.owners}
        assert manager.num_used == len({block for table in tables.values() for block in table})
        assert manager.num_entries == sum(map(len, tables.values()))
        assert manager.num_free + manager.num_cached + manager.num_used == manager.num_blocks
        assert manager.num_available == manager.num_free + manager.num_cached
        for owner in self.owners:
            table = tables[owner.name]
            assert manager.table_length(owner.name) == len(table)
            read = [name for block in table for name in self.cells[block]]
            assert read[: owner.computed] == owner.names[: owner.computed], "an owner reads what is not its own"
            if owner.may_commit:
                prefix = manager.match(token_key(owner.tokens), owner.salt, owner.committed * size)
                assert prefix.num_tokens == owner.committed * size, "what was committed is known while it is used"
                assert prefix.blocks[: owner.committed] == table[: owner.committed]

    def teardown(self) -> None:
        if not hasattr(self, "manager"):
            return
        while self.owners:
            self.release(0)
        self.everybody_reads_his_own()
        assert self.manager.num_used == self.manager.num_entries == 0
        self.manager.clear()
        assert self.manager.num_free == self.manager.num_blocks


TestManagerLives = ManagerLives.TestCase
TestManagerLives.settings = settings(
    max_examples=80 * TIMES, stateful_step_count=40, deadline=None, database=None, print_blob=False
)


def test_the_lives_were_full_of_events() -> None:
    """Runs after the lives (pytest keeps the order of a file)."""
    if not EVENTS["operations"]:
        pytest.skip("the random lives were not run")
    print(EVENTS)
    assert EVENTS["operations"] >= 2000 * TIMES
    assert all(number >= 10 * TIMES for number in EVENTS.values()), EVENTS
