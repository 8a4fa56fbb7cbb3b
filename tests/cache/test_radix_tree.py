"""Each rule of the radix tree by itself: what splits, merges, shares, is evicted first, and what `check` sees."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from minivllm.cache.radix_tree import RadixNode, RadixTree, common_blocks, token_key

BLOCK_SIZES = [8, 16, 32, 64, 128, 256]
HEAP_SLACK = 64


def key_of(text: str, block_size: int = 8) -> bytes:
    """A block of tokens for each letter. All blocks begin alike, so that only a whole comparison tells them apart."""
    return b"".join(token_key([7] * (block_size - 1) + [ord(letter)]) for letter in text)


def num_nodes(tree: RadixTree) -> int:
    return sum(1 for _ in tree._nodes())


def insert(tree: RadixTree, text: str, blocks: list[int], salt: str | None = None, block_size: int = 8) -> RadixNode:
    """Pin what the tree knows of `text` and insert the rest, as the end of a request does; returns the pin."""
    node, known, _ = tree.match(key_of(text, block_size), salt)
    node, _ = tree.insert(tree.pin(node, len(known), salt), key_of(text, block_size), blocks)
    return node


def filled(*texts: str, salt: str | None = None, block_size: int = 8) -> RadixTree:
    """A tree into which the texts came in this order; letter n of text number k has block 100 * k + n."""
    tree = RadixTree(block_size)
    for number, text in enumerate(texts):
        blocks = list(range(100 * number, 100 * number + len(text)))
        tree.unpin(insert(tree, text, blocks, salt, block_size))
    tree.check([])
    return tree


def edges(tree: RadixTree) -> list[str]:
    """All edges as letters: the last token of each block is one."""
    found = []
    for node in tree._nodes():
        block_bytes = tree._block_bytes
        tokens = [node.key[begin : begin + block_bytes][-4:] for begin in range(0, len(node.key), block_bytes)]
        found += ["".join(chr(int.from_bytes(token, "little")) for token in tokens)] * bool(tokens)
    return sorted(found)


def test_token_key_keeps_beginnings(seed: int) -> None:
    rng = random.Random(seed)
    tokens = rng.choices([0, 1, 255, 256, 2**31 - 1], k=50)
    keys = {token_key(tokens[:length]) for length in range(51)}
    assert len(keys) == 51
    for length in range(51):
        assert token_key(tokens).startswith(token_key(tokens[:length]))
        assert token_key(tokens[:length]) + token_key(tokens[length:]) == token_key(tokens)


def test_common_blocks_counts_whole_blocks_only(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(500):
        size, start, length = rng.choice([1, 4, 32]), rng.randint(0, 3), rng.randint(1, 40)
        edge = rng.randbytes(length * size)
        key = bytearray(rng.randbytes(start * size) + edge + rng.randbytes(rng.randint(0, 2 * size)))
        differs = rng.randrange(start * size, len(key))
        key[differs] ^= 1
        truth = min(differs // size - start, length)
        low, most = rng.randint(0, truth), rng.randint(truth, length)
        assert common_blocks(edge, bytes(key), start, low, most, size) == truth


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_difference_inside_a_block_splits_before_it(block_size: int, seed: int) -> None:
    rng = random.Random(seed)
    tree, tokens = RadixTree(block_size), rng.choices(range(1000), k=5 * block_size)
    tree.unpin(tree.insert(tree.pin(None, 0, None), token_key(tokens), [0, 1, 2, 3, 4])[0])
    place = rng.randrange(2 * block_size, 3 * block_size)
    other = [*tokens[:place], 1000, *tokens[place + 1 :]]
    node, blocks, num_unpinned = tree.match(token_key(other), None)
    assert (blocks, num_unpinned) == ([0, 1], 2)
    pin = tree.pin(node, 2, None)
    pin, found = tree.insert(pin, token_key(other), [0, 1, 12, 13, 14])
    assert found == 2
    tree.unpin(pin)
    assert (tree.num_blocks, num_nodes(tree)) == (8, 4), "a root, what both share, and two ends"
    assert tree.match(token_key(tokens), None).blocks == [0, 1, 2, 3, 4]
    assert tree.match(token_key(other), None).blocks == [0, 1, 12, 13, 14]
    assert tree.match(token_key(other[: 4 * block_size - 1]), None).blocks == [0, 1, 12], "part of a block is none"
    tree.check([])


def test_match_changes_nothing() -> None:
    tree = filled("abc", "abd", "x")
    before = [(id(node), node.key, list(node.blocks), node.pins, node.last_used) for node in tree._nodes()]
    for text in ("", "abc", "abdd", "ac", "q", "xx"):
        for salt in (None, "tenant"):
            tree.match(key_of(text), salt)
    assert before == [(id(node), node.key, list(node.blocks), node.pins, node.last_used) for node in tree._nodes()]


def test_the_least_recently_used_end_goes_first() -> None:
    tree = filled("abc", "abd", "x")
    node, blocks, _ = tree.match(key_of("abc"), None)
    tree.unpin(tree.pin(node, len(blocks), None))
    assert tree.evict(1) == [102], "d, as abc was used again since"
    assert tree.evict(1) == [200]
    assert tree.evict(3) in ([0, 1, 2], [2, 1, 0])
    assert num_nodes(tree) == 0


def test_use_of_the_beginning_does_not_refresh_the_end() -> None:
    tree = filled("abcd", "xyz")
    node, _, _ = tree.match(key_of("ab"), None)
    tree.unpin(tree.pin(node, 2, None))
    assert sorted(tree.evict(2)) == [2, 3], "c and d were not used with ab"
    assert sorted(tree.evict(3)) == [100, 101, 102]
    assert sorted(tree.evict(2)) == [0, 1]


def test_only_what_no_pin_protects_is_evicted() -> None:
    tree = filled("abcd")
    node, _, _ = tree.match(key_of("abcd"), None)
    pins = [tree.pin(node, 2, None), tree.pin(node, 3, None)]
    assert (tree.num_blocks, tree.num_evictable) == (4, 1)
    assert tree.evict(1) == [3]
    with pytest.raises(AssertionError, match="only 0 can be"):
        tree.evict(1)
    tree.unpin(pins[1])
    assert tree.evict(1) == [2]
    tree.check(pins[:1])
    tree.unpin(pins[0])
    assert sorted(tree.evict(2)) == [0, 1]


def test_pieces_are_one_edge_again_once_the_sibling_is_gone() -> None:
    tree = filled("abcd", "abxy")
    assert edges(tree) == ["ab", "cd", "xy"]
    tree.evict(1)
    assert edges(tree) == ["ab", "c", "xy"]
    tree.evict(1)
    assert edges(tree) == ["abxy"]
    tree.check([])
    assert tree.match(key_of("abxy"), None).blocks == [0, 1, 102, 103]


def test_pieces_are_one_edge_again_once_nobody_ends_between_them() -> None:
    tree = filled("abcd")
    node, _, _ = tree.match(key_of("abcd"), None)
    whole, part = tree.pin(node, 4, None), tree.pin(node, 2, None)
    assert edges(tree) == ["ab", "cd"]
    tree.check([whole, part])
    tree.unpin(part)
    assert edges(tree) == ["ab", "cd"], "ab was used without cd"
    tree.unpin(whole)
    assert edges(tree) == ["abcd"]


def test_no_merge_under_a_pin_that_ends_there() -> None:
    tree = filled("abcd", "abxy")
    node, _, _ = tree.match(key_of("ab"), None)
    pin = tree.pin(node, 2, None)
    tree.evict(4)
    assert edges(tree) == ["ab"]
    pin, _ = tree.insert(pin, key_of("abz"), [0, 1, 7])
    assert edges(tree) == ["abz"], "whoever ends alone at an edge's end makes it longer"
    tree.check([pin])


def test_a_chat_stays_one_edge() -> None:
    tree, text = RadixTree(8), ""
    for turn in range(20):
        text += "abc"[turn % 3] * (turn % 4 + 1)
        tree.unpin(insert(tree, text, list(range(len(text)))))
        tree.check([])
    assert edges(tree) == [text]


def test_whoever_comes_second_gets_the_blocks_of_the_first() -> None:
    tree = RadixTree(8)
    first, second, third = (tree.pin(None, 0, None) for _ in range(3))
    first, found = tree.insert(first, key_of("abcd"), [0, 1, 2, 3])
    assert found == 0
    blocks = [10, 11, 12, 13]
    second, found = tree.insert(second, key_of("abxy"), blocks)
    assert (found, blocks) == (2, [0, 1, 12, 13])
    blocks = [20, 21]
    third, found = tree.insert(third, key_of("abxyz"), blocks)
    assert (found, blocks) == (2, [0, 1])
    blocks += [22, 23, 24]
    third, found = tree.insert(third, key_of("abxyz"), blocks)
    assert (found, blocks) == (4, [0, 1, 12, 13, 24]), "the first two were its own prefix"
    assert tree.num_shared(first) == 2
    assert tree.num_shared(third) == 4
    tree.check([first, second, third])


def test_a_key_may_be_longer_than_what_is_inserted() -> None:
    """A request commits the computed part of its prompt, of which the tree may know more from another."""
    tree = filled("abcd")
    blocks = [10, 11]
    pin, found = tree.insert(tree.pin(None, 0, None), key_of("abcd"), blocks)
    assert (found, pin.end, blocks) == (2, 2, [0, 1])
    blocks = [10, 11, 12]
    pin, found = tree.insert(pin, key_of("abcd"), blocks)
    assert (found, pin.end, blocks) == (3, 3, [10, 11, 2])
    tree.check([pin])
    assert tree.num_evictable == 1


def test_salts_share_nothing_and_leave_nothing() -> None:
    tree, pins = RadixTree(8), []
    for number in range(100):
        salt = f"tenant {number}" if number else None
        assert tree.match(key_of("ab"), salt).blocks == []
        pins.append(insert(tree, "ab", [2 * number, 2 * number + 1], salt))
    tree.check(pins)
    assert len(tree._roots) == 100
    for number in range(100):
        assert tree.match(key_of("ab"), f"tenant {number}" if number else None).blocks == [2 * number, 2 * number + 1]
    for pin in pins[::2]:
        tree.unpin(pin)
    tree.evict(100)
    assert len(tree._roots) == 50
    for pin in pins[1::2]:
        tree.unpin(pin)
    tree.evict(100)
    assert tree._roots == {}
    pin = tree.pin(None, 0, "passing by")
    tree.check([pin])
    tree.unpin(pin)
    assert tree._roots == {}


def test_pins_come_and_go_and_nothing_grows(seed: int) -> None:
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abcd", k=rng.randint(1, 8))) for _ in range(50)]
    tree = filled(*dict.fromkeys(texts))
    pins: list[RadixNode] = []
    for _ in range(5000):
        if len(pins) < 5:
            text = rng.choice(texts)
            node, blocks, _ = tree.match(key_of(text), None)
            assert len(blocks) == len(text)
            pins.append(tree.pin(node, rng.randint(0, len(blocks)), None))
        else:
            tree.unpin(pins.pop(rng.randrange(5)))
        assert len(tree._leaves._heap) <= 2 * len(tree._leaves) + HEAP_SLACK
    tree.check(pins)
    assert num_nodes(tree) <= tree.num_blocks + 1


def test_a_long_edge_is_matched_cut_and_eaten_from_its_end(seed: int) -> None:
    rng = random.Random(seed)
    length = 1000
    text = "".join(rng.choices("ab", k=length))
    tree = filled(text)
    assert num_nodes(tree) == 2
    for _ in range(50):
        cut = rng.randint(0, length)
        other = text[:cut] + "c" * rng.randint(0, 3)
        assert tree.match(key_of(other), None).blocks == list(range(cut))
    node = tree.match(key_of(text), None).node
    pin = tree.pin(node, 600, None)
    assert num_nodes(tree) == 3
    tree.unpin(pin)
    left = set(range(length))
    while left:
        number = min(rng.randint(1, 60), len(left))
        gone = set(tree.evict(number))
        left -= gone
        assert left == set(range(len(left))), "the end goes first"
        assert tree.match(key_of(text), None).blocks == list(range(len(left)))
    tree.check([])


def test_clear_voids_everything_and_life_goes_on() -> None:
    tree = filled("abc", "abd")
    tree.pin(tree.match(key_of("ab"), None).node, 2, None)
    assert sorted(tree.clear()) == [0, 1, 2, 102]
    assert (tree.num_blocks, tree.num_evictable, num_nodes(tree)) == (0, 0, 0)
    tree.check([])
    pin = insert(tree, "abc", [5, 6, 7])
    tree.check([pin])
    assert tree.clear() == [5, 6, 7]
    assert tree.clear() == []


def test_pinning_more_than_is_known_is_caught() -> None:
    tree = filled("ab")
    with pytest.raises(AssertionError, match="2 are known"):
        tree.pin(tree.match(key_of("ab"), None).node, 3, None)


def longest(tree: RadixTree) -> RadixNode:
    return max(tree._nodes(), key=lambda node: node.end)


def lose_a_block(tree: RadixTree) -> None:
    longest(tree).blocks.pop()


def pin_behind_its_back(tree: RadixTree) -> None:
    longest(tree).pins += 1


def forget_a_leaf(tree: RadixTree) -> None:
    tree._leaves.discard(longest(tree))


def swap_a_parent(tree: RadixTree) -> None:
    longest(tree).parent = RadixNode(None, b"", [], 0, None)


def misname_a_child(tree: RadixTree) -> None:
    parent = longest(tree).parent
    parent.children = {key_of("q"): child for child in parent.children.values()}


def use_the_end_alone(tree: RadixTree) -> None:
    longest(tree).last_used += 10


def keep_an_empty_root(tree: RadixTree) -> None:
    tree._roots["gone"] = RadixNode(None, b"", [], 0, "gone")


def give_a_root_an_edge(tree: RadixTree) -> None:
    tree._roots[None].key, tree._roots[None].blocks = key_of("q"), [9]


def miscount(tree: RadixTree) -> None:
    tree.num_blocks += 1


def miscount_evictable(tree: RadixTree) -> None:
    tree.num_evictable -= 1


CORRUPTIONS = {
    lose_a_block: "tokens and blocks differ",
    pin_behind_its_back: "wrong pins",
    forget_a_leaf: "heap of leaves",
    swap_a_parent: "does not know its parent",
    misname_a_child: "wrong name",
    use_the_end_alone: "used beyond its beginning",
    keep_an_empty_root: "root without use",
    give_a_root_an_edge: "or a root is not",
    miscount: "wrong number of blocks",
    miscount_evictable: "wrong evictable blocks",
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
def test_check_sees_what_is_wrong(corrupt: Callable[[RadixTree], None]) -> None:
    tree = filled("abcd", "abx")
    tree.check([])
    corrupt(tree)
    with pytest.raises(AssertionError, match=CORRUPTIONS[corrupt]):
        tree.check([])


def test_check_sees_pins_that_are_not_there() -> None:
    tree = filled("ab")
    pin = tree.pin(tree.match(key_of("ab"), None).node, 2, None)
    for pins in ([], [pin, pin]):
        with pytest.raises(AssertionError, match="wrong pins"):
            tree.check(pins)
    with pytest.raises(AssertionError, match="not in the tree"):
        tree.check([pin, RadixNode(None, b"", [], 0, None)])


def test_a_chain_of_edges_becomes_one_when_its_last_user_leaves() -> None:
    tree, tokens = RadixTree(8), list(range(40))
    key = token_key(tokens)
    node, _ = tree.insert(tree.pin(None, 0, None), key, [0, 1, 2, 3, 4])
    users = [tree.pin(node, count, None) for count in (1, 2, 3, 4)]  # cuts the edge at every border
    for user in users:
        tree.unpin(user)
    tree.check([node])
    tree.unpin(node)
    tree.check([])
    [root] = tree._roots.values()
    [edge] = root.children.values()
    assert (edge.blocks, edge.children) == ([0, 1, 2, 3, 4], {})
