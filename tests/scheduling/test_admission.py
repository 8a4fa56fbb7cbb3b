"""Who is let in: by what everybody was promised at most, by the likely lengths, and never without room for a token.

With exact forecasts nobody who was let in may ever be short of a block: random loads are walked through token by token.
"""

from __future__ import annotations

import random

import pytest

from minivllm.cache.block_manager import BlockManager
from minivllm.request import Request
from minivllm.scheduling.admission import Admission
from minivllm.scheduling.prefixes import best_prefix
from tests.scheduling import make_request


class Walk:
    """Requests over a real block manager that compute their prompt at once and then a token a step."""

    def __init__(self, num_blocks: int, block_size: int = 8, **options: bool) -> None:
        self.blocks = BlockManager(num_blocks, block_size, **options)
        self.admission = Admission(self.blocks)
        self.running: list[Request] = []

    def shortage(self, request: Request) -> int:
        decoding = {self.slot(one): one for one in self.running}
        return self.admission.shortage(request, best_prefix(request, self.blocks, ()), decoding, [])

    def fits(self, request: Request) -> bool:
        return self.shortage(request) <= 0

    def start(self, request: Request) -> Request:
        prefix = best_prefix(request, self.blocks, ())
        slot = request.slot = request.arrival_number
        self.blocks.open(slot, prefix, None)
        self.admission.opened(request)
        request.num_scheduled = request.num_known
        self.blocks.grow(slot, request.num_known)
        self.blocks.commit(slot, request.key, request.num_known)
        request.output_token_ids.append(1)
        self.running.append(request)
        return request

    def step(self) -> None:
        for request in [request for request in self.running if request.num_scheduled == request.num_to_schedule]:
            self.leave(request)
        for request in self.running:
            request.num_scheduled += 1
            self.blocks.grow(self.slot(request), request.num_scheduled)  # asserts that a block is available
            request.output_token_ids.append(1)
        self.admission.begin_step()

    def leave(self, request: Request) -> None:
        self.running = [one for one in self.running if one is not request]
        self.admission.closed(request)
        self.admission.ended(request)
        self.admission.begin_step()
        self.blocks.release(self.slot(request))
        request.slot = None

    @staticmethod
    def slot(request: Request) -> int:
        assert request.slot is not None
        return request.slot


def prompt(length: int) -> list[int]:
    """Tokens that nobody else has."""
    return random.Random().choices(range(10**6), k=length)


def expect(walk: Walk, length: int) -> None:
    """Let answers be likely to have `length` tokens."""
    for _ in range(512):
        walk.admission._lengths.record(length)


def some_request(walk: Walk, rng: random.Random, sharing: bool) -> Request:
    """One that fits alone, and begins as one before it. Where not `sharing`, as one that is gone by now."""
    size = walk.blocks.block_size
    total = rng.randint(2, walk.blocks.num_tokens + 1)
    length = rng.randint(1, total - 1)
    shared, stem = rng.randint(0, length), rng.randrange(3)
    if not sharing and any(one.prompt_token_ids[0] == stem for one in walk.running):
        shared = 0
    tokens = [stem] * shared + rng.choices(range(10**6), k=length - shared)
    return make_request(tokens, min(total - length, 5 * size), ignore_eos=True)


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("block_size", [8, 64])
def test_with_exact_forecasts_nobody_is_ever_short(
    block_size: int, prefix_caching: bool, sharing: bool, seed: int
) -> None:
    rng = random.Random(seed)
    walk = Walk(rng.randint(4, 40), block_size, prefix_caching=prefix_caching)
    num_started = 0
    for _ in range(200):
        request = some_request(walk, rng, sharing)
        if sharing and walk.running and rng.random() < 0.4:  # another sample of one that runs
            leader = rng.choice(walk.running)
            options = {"ignore_eos": True, "leader": leader, "index": 1}
            request = make_request(leader.prompt_token_ids, leader.max_tokens, **options)
        if rng.random() < 0.03:
            walk.blocks.clear()
        if walk.fits(request):
            walk.start(request)
            num_started += 1
        for _ in range(rng.randint(0, block_size)):
            walk.step()
        walk.admission.check(walk.running)
        walk.blocks.check(map(walk.slot, walk.running))
    assert num_started >= 20
    assert len(walk.running) < num_started, "some came to their end"


def test_a_shortage_is_ended_by_an_end_or_by_time() -> None:
    """The later a newcomer begins, the less it has grown when another gives its blocks back."""
    walk = Walk(20)
    walk.start(make_request(prompt(8), 81, ignore_eos=True))  # 80 steps, 11 blocks in the end
    late = make_request(prompt(8), 97, ignore_eos=True)
    assert walk.shortage(late) == 2, "10 more blocks each, and 1 for the prompt: 19 are left"
    for _ in range(16):
        walk.step()
    assert walk.shortage(late) == 0
    walk.start(late)
    while walk.running:
        walk.step()


def test_the_forecast_never_asks_for_more_than_the_promises() -> None:
    walk = Walk(6)
    for _ in range(3):
        walk.start(make_request(prompt(1), 8, ignore_eos=True))  # one block each, now and in the end
    assert walk.fits(make_request(prompt(8), 17)), "three are left, and three is what it can need"
    assert walk.shortage(make_request(prompt(8), 25)) == 1


def test_an_end_lowers_a_shortage_by_no_more_than_promised(seed: int) -> None:
    rng = random.Random(seed)
    num_refused = 0
    while num_refused < 20:
        walk = Walk(rng.randint(8, 40))
        for _ in range(8):
            request = some_request(walk, rng, False)
            if walk.fits(request):
                walk.start(request)
        request, leaving = some_request(walk, rng, False), rng.choice(walk.running)
        shortage = walk.shortage(request)
        if shortage > 0:
            num_refused += 1
            walk.leave(leaving)
            assert walk.shortage(request) >= shortage - walk.admission.most_given_back(leaving)


def test_promises_alone_are_enough() -> None:
    walk = Walk(10)
    expect(walk, 10**6)
    walk.start(make_request(prompt(8), 25))  # at most 4 blocks
    assert walk.fits(make_request(prompt(8), 41))  # at most 6
    walk.start(make_request(prompt(8), 41))
    assert not walk.fits(make_request(prompt(8), 41))
    walk.admission.check(walk.running)


def test_likely_lengths_let_in_more_than_promises() -> None:
    walk = Walk(10)
    for _ in range(2):
        walk.start(make_request(prompt(8), 33))  # at most 5 blocks each
    late = make_request(prompt(8), 33)
    assert not walk.fits(late), "nothing is known of lengths"
    expect(walk, 9)
    assert walk.fits(late), "two blocks each"
    expect(walk, 33)
    assert not walk.fits(late)


def test_lengths_that_are_certain_are_not_guessed() -> None:
    for options, fits in (({}, True), ({"ignore_eos": True}, False), ({"ignore_eos": True, "stop": True}, True)):
        walk = Walk(10)
        for _ in range(2):
            walk.start(make_request(prompt(8), 33, **options))
        expect(walk, 9)
        assert walk.fits(make_request(prompt(8), 33, **options)) is fits


def test_what_comes_back_in_time_is_counted_on() -> None:
    walk = Walk(10)
    early = walk.start(make_request(prompt(40), 9, ignore_eos=True))
    late = make_request(prompt(8), 65, ignore_eos=True)  # 9 blocks in the end, when the other is long gone
    assert walk.fits(late)
    walk.start(late)
    while walk.running:
        walk.step()
    assert early.num_scheduled == early.num_to_schedule


def test_beside_nobody_everything_fits_that_fits_at_all() -> None:
    walk = Walk(10)
    assert walk.fits(make_request(prompt(80), 1))
    assert walk.fits(make_request(prompt(40), 41))
    walk.start(make_request(prompt(40), 1))
    walk.leave(walk.running[0])
    assert walk.blocks.num_cached == 5
    assert walk.fits(make_request(prompt(80), 1)), "what is cached is room"


def test_the_first_token_needs_room_in_any_case() -> None:
    walk = Walk(10)
    gone = walk.start(make_request(prompt(80), 1))
    walk.running = []  # its last batch is still out
    assert not walk.fits(make_request(prompt(1), 1))
    walk.leave(gone)
    assert walk.fits(make_request(prompt(1), 1))


def test_whoever_is_leaving_is_not_waited_for() -> None:
    walk = Walk(10)
    walk.start(make_request(prompt(40), 1))
    walk.running = []
    assert walk.fits(make_request(prompt(8), 73)), "10 blocks in the end; 5 come back when a batch lands"


def test_answers_that_ended_teach_the_forecast() -> None:
    walk = Walk(10)
    for length in (3, 5, 9):
        walk.leave(walk.start(make_request(prompt(1), 20, output_token_ids=[1] * (length - 1))))
    assert list(walk.admission._lengths._recent) == [3, 5, 9]


def test_a_shared_prefix_is_not_counted_twice() -> None:
    walk, tokens = Walk(10), prompt(57)
    walk.start(make_request(tokens, 8))  # 8 blocks
    assert not walk.fits(make_request(prompt(57), 8))
    assert walk.fits(make_request(tokens[:56] + prompt(1), 8)), "7 of its 8 blocks are there"


def test_what_is_cached_counts_as_room_unless_it_is_the_prefix_itself() -> None:
    walk, tokens = Walk(10), prompt(64)
    walk.leave(walk.start(make_request(tokens, 1)))
    walk.start(make_request(prompt(4), 5, ignore_eos=True))
    assert (walk.blocks.num_free, walk.blocks.num_cached) == (1, 8)
    assert walk.fits(make_request(tokens + prompt(7), 2))
    assert not walk.fits(make_request(tokens + prompt(7), 3))
    assert walk.fits(make_request(prompt(71), 2))


def test_answers_of_a_preempted_request_count_as_generated() -> None:
    walk = Walk(10)
    walk.start(make_request(prompt(8), 33, ignore_eos=True))
    expect(walk, 9)
    again = make_request(prompt(8), 65, output_token_ids=[1] * 40)
    again.num_known, again.key = 48, again.key + b"\0" * 160
    assert not walk.fits(again), "it may double, as it is longer than all others"
    expect(walk, 41)
    assert walk.fits(again)


def test_what_the_newcomer_shares_does_not_come_back() -> None:
    walk, tokens = Walk(11), prompt(40)
    walk.start(make_request(tokens, 9, ignore_eos=True))  # 5 blocks, 6 in the end, after 8 steps
    walk.start(make_request(prompt(8), 25, ignore_eos=True))  # 1 block, 4 in the end, after 24 steps
    newcomer = make_request(tokens + prompt(1), 25, ignore_eos=True)  # 4 of its own after 24 steps: 3 + 4 > 5
    assert walk.blocks.num_available == 5
    assert not walk.fits(newcomer)


def test_a_second_newcomer_counts_on_no_more_than_the_first() -> None:
    walk, tokens = Walk(16), prompt(40)
    expect(walk, 25)
    walk.start(make_request(tokens, 9))  # 5 blocks, 1 more within 8 steps
    sharing = make_request(tokens + prompt(1), 81)
    assert walk.fits(sharing)
    walk.start(sharing)  # 1 of its own, 3 more within 24 steps
    late = make_request(prompt(40), 81)  # 5, and 3 more when the second ends
    assert walk.blocks.num_available == 10
    in_the_same_step = walk.shortage(late)
    walk.admission.begin_step()
    assert in_the_same_step == walk.shortage(late) == 1


# What a newcomer shares with one other is not given back when that one ends. It is not needed before, either.
def test_sharing_a_long_prompt_needs_no_room_for_it() -> None:
    walk, tokens = Walk(20), prompt(80)
    expect(walk, 9)
    walk.start(make_request(tokens, 81))  # 10 blocks, likely 2 more
    assert walk.blocks.num_available == 10
    assert walk.fits(make_request(tokens + prompt(1), 80)), "1 block and likely 2 more"


def test_check_sees_promises_that_were_lost() -> None:
    walk = Walk(10)
    walk.start(make_request(prompt(8), 33))
    walk.admission.check(walk.running)
    with pytest.raises(AssertionError, match="promises differ"):
        walk.admission.check([])
