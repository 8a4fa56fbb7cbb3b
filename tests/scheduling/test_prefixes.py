"""What a waiting request can share, and for whom it waits: each rule, and all of them against a plain comparison."""

from __future__ import annotations

import random
from typing import Any

import pytest

from minivllm.batch import TokenLogprobs
from minivllm.cache.block_manager import BlockManager, Prefix
from minivllm.request import FinishReason, Request
from minivllm.scheduling.prefixes import Ahead, best_prefix, computed_by_another
from tests.scheduling import make_request

PROMPT = list(range(20))
BLOCK_SIZES = [8, 16, 32, 64, 128, 256]


def run(blocks: BlockManager, request: Request, slot: int, commit: bool = True) -> Request:
    """Compute all that is known of `request` in `slot`."""
    request.slot = slot
    blocks.open(slot, blocks.match(b"", request.cache_salt, 0), request.cache_salt)
    blocks.grow(slot, request.num_known)
    if commit:
        blocks.commit(slot, request.key, request.num_known)
    request.num_scheduled = request.num_known
    return request


def cached(*prompts: list[int], **options: Any) -> BlockManager:
    blocks = BlockManager(40, 8)
    for slot, prompt in enumerate(prompts):
        run(blocks, make_request(prompt, **options), slot)
        blocks.release(slot)
    return blocks


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 20])
def test_the_last_token_is_always_left(length: int) -> None:
    blocks = cached(PROMPT)
    prefix = best_prefix(make_request(PROMPT[:length]), blocks, {})
    assert prefix.num_tokens == min(length // 8 * 8, length - 1)


def test_only_the_same_salt_is_shared() -> None:
    blocks = cached(PROMPT, cache_salt="a")
    found = [best_prefix(make_request(PROMPT, cache_salt=salt), blocks, {}).num_tokens for salt in ("a", "b", None)]
    assert found == [16, 0, 0]


def test_whoever_needs_every_token_shares_none_but_may_be_shared() -> None:
    blocks = cached(PROMPT)
    for options in ({"prompt_logprobs": 0}, {"pooling": "mean"}):
        prefix = best_prefix(make_request(PROMPT, **options), blocks, {})
        assert (prefix.num_tokens, prefix.blocks, prefix.may_commit) == (0, [], True)
    assert best_prefix(make_request(PROMPT, pooling="last"), blocks, {}).num_tokens == 16
    told = make_request(PROMPT, prompt_logprobs=0)
    told.prompt_logprobs = [TokenLogprobs(1, -1.0, 1, ())] * 19
    assert best_prefix(told, blocks, {}).num_tokens == 16, "preempted after all were told"


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_a_sample_shares_all_but_the_last_token_of_its_leader(prefix_caching: bool) -> None:
    blocks = BlockManager(40, 8, prefix_caching=prefix_caching)
    leader = run(blocks, make_request(PROMPT), 3)
    sample = make_request(PROMPT, leader=leader, index=1)
    assert best_prefix(sample, blocks, {}) == blocks.prefix_of(3, 19)
    plain = blocks.match(sample.key, None, 19)
    assert best_prefix(sample, blocks, {leader: None}) == plain, "the leader's prompt is not computed yet"
    leader.finish_reason = FinishReason.ABORT
    assert best_prefix(sample, blocks, {}) == plain
    leader.finish_reason, leader.slot = None, None
    assert best_prefix(sample, blocks, {}) == plain


def test_a_sample_that_has_an_answer_already_prefers_the_longer_prefix() -> None:
    blocks = cached([*PROMPT, 50, 51, 52, 53, 54])
    leader = run(blocks, make_request(PROMPT), 3)
    sample = make_request(PROMPT, leader=leader, index=1)
    assert best_prefix(sample, blocks, {}).num_tokens == 19
    again = make_request([*PROMPT, 50, 51, 52, 53, 54, 55], leader=leader, index=1)
    again.prompt_token_ids, again.output_token_ids = again.prompt_token_ids[:20], again.prompt_token_ids[20:]
    assert best_prefix(again, blocks, {}).num_tokens == 24


def ahead(request: Request, prefix: int, computing: list[Request], aware: bool = True, block_size: int = 8):
    known = Prefix(prefix, [], None, 0, True)
    return computed_by_another(request, known, dict.fromkeys(computing), block_size, aware)


@pytest.mark.parametrize("aware", [True, False])
def test_a_sample_waits_for_its_leader(aware: bool) -> None:
    leader = make_request(PROMPT)
    sample = make_request(PROMPT, leader=leader, index=1)
    for prefix in (0, 8, 18):
        assert ahead(sample, prefix, [make_request([99]), leader], aware) == Ahead(leader, 20)
    assert ahead(sample, 19, [leader], aware) is None, "all that can be shared is computed"
    assert ahead(sample, 0, [], aware) is None


def test_others_wait_only_where_that_is_asked_for_and_of_use() -> None:
    other = make_request(PROMPT)
    assert ahead(make_request(PROMPT), 0, [make_request([99] * 20), other]) == Ahead(other, 16)
    assert ahead(make_request(PROMPT), 0, [other], aware=False) is None
    assert ahead(make_request(PROMPT, cache_salt="b"), 0, [other]) is None
    assert ahead(make_request(PROMPT, prompt_logprobs=1), 0, [other]) is None
    assert ahead(make_request(PROMPT, pooling="mean"), 0, [other]) is None
    assert ahead(make_request(PROMPT, pooling="last"), 0, [other]) == Ahead(other, 16)
    assert ahead(make_request(PROMPT[:16]), 15, [other]) is None, "one token is left, which is computed in any case"
    assert ahead(make_request(PROMPT[:7]), 0, [other]) is None, "less than a block is not shared"


def test_half_of_what_is_left_is_worth_the_wait() -> None:
    other = make_request(PROMPT[:16])
    for length, waits in ((31, True), (32, True), (33, False)):
        request = make_request(PROMPT[:16] + list(range(100, 100 + length - 16)))
        assert (ahead(request, 0, [other]) is not None) is waits
    for length, waits in ((23, True), (24, True), (25, False)):
        request = make_request(PROMPT[:16] + list(range(100, 100 + length - 16)))
        assert (ahead(request, 8, [other]) is not None) is waits, "8 tokens less to gain"
    assert ahead(make_request(PROMPT), 16, [other]) is None, "it knows all that the other will"


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_it_agrees_with_a_plain_comparison(block_size: int, seed: int) -> None:
    rng = random.Random(seed)
    stem = [1] * (8 * block_size)
    found = 0

    def some_prompt() -> list[int]:
        shared = rng.randint(0, 6 * block_size)
        return stem[:shared] + rng.choices(range(2, 4), k=rng.randint(1, 2 * block_size))

    def common(first: list[int], second: list[int]) -> int:
        same = next((n for n, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), None)
        return (min(len(first), len(second)) if same is None else same) // block_size * block_size

    num_tries = 0
    while num_tries < 60 or found < 3:
        num_tries += 1
        assert num_tries < 5000, "nobody ever waits"
        prompt, computing = some_prompt(), [make_request(some_prompt()) for _ in range(4)]
        request = make_request(prompt)
        prefix = min(len(prompt) - 1, rng.randint(0, 6) * block_size)
        left = len(prompt) - prefix
        shares = [(other, common(prompt, other.prompt_token_ids)) for other in computing]
        useful = [Ahead(other, count) for other, count in shares if left > 1 and 2 * (count - prefix) >= left]
        assert ahead(request, prefix, computing, True, block_size) == (useful[0] if useful else None)
        found += bool(useful)
