"""What the scheduler decides when requests compete: cache hits, samples, admission, preemption, priority, deadlines."""

from __future__ import annotations

import pytest

from minivllm.errors import QueueFullError, RequestError
from tests.scheduler_world import ABORT, LENGTH, TIMEOUT, World, calm, expect_short_answers, expected


def events(world: World, name: str) -> list[dict[str, object]]:
    return [facts for event, _, facts in world.events if event == name]


def run(world: World, steps: int) -> None:
    for _ in range(steps):
        if world.schedule():
            world.update()


def test_a_second_request_computes_only_what_is_new() -> None:
    world = World()
    prompt = list(range(30))
    calm(world, 30, 2, prompt=prompt)
    world.drain()
    second = calm(world, 40, 2, prompt=[*prompt, *range(100, 110)])
    batch = world.schedule()
    assert batch is not None
    assert (batch.starts, batch.lengths, batch.token_ids) == ([24], [16], [*prompt[24:], *range(100, 110)])
    assert second.num_cached_tokens == 24, "three whole blocks of 8"
    world.update()
    world.drain()
    assert (world.blocks.stats.prompt_tokens, world.blocks.stats.cached_tokens) == (70, 24)


def test_a_full_hit_computes_the_last_token_alone_in_a_copy_of_its_block() -> None:
    world = World()
    first = calm(world, 16, 2)
    world.drain()
    again = calm(world, 16, 2, prompt=first.prompt_token_ids)
    batch = world.schedule()
    assert batch is not None
    assert (batch.starts, batch.lengths, batch.copy_sources) == ([15], [1], [1])
    assert again.num_cached_tokens == 15
    copied = world.blocks.table(0)
    world.update()
    assert batch.copy_targets == copied[1:], "computed in its own copy"
    assert world.blocks.table(0)[:2] == [0, 1], "which is given back for the cached block once it is complete"
    batch = world.schedule()
    assert batch is not None
    assert (batch.block_indices[0], batch.block_ids[0]) != (1, 1), "the new block of the next token comes first"
    assert (1, 1) in zip(batch.block_indices, batch.block_ids, strict=True), "the runner learns of the change"
    world.update()
    world.drain()


def test_the_next_turn_of_a_chat_hits_the_answer() -> None:
    world = World()
    first = calm(world, 12, 13)
    world.drain()
    turn = [*first.prompt_token_ids, *first.output_token_ids, 50, 51, 52]
    second = calm(world, len(turn), 2, prompt=turn)
    world.drain()
    assert len(turn) == 28
    assert second.num_cached_tokens == 24, "12 + 12 computed tokens; the last one drawn was never computed"


def test_salts_keep_tenants_apart() -> None:
    world = World()
    prompt = list(range(40))
    calm(world, 40, 1, prompt=prompt, cache_salt="a")
    world.drain()
    others = [calm(world, 40, 1, prompt=prompt, cache_salt=salt) for salt in ("b", None, "a")]
    world.drain()
    assert [request.num_cached_tokens for request in others] == [0, 0, 39]


def test_clear_under_load_forgets_and_nothing_breaks() -> None:
    world = World()
    prompt = list(range(32))
    running = calm(world, 32, 20, prompt=prompt)
    run(world, 3)
    world.schedule()
    world.clear_cache()
    late = calm(world, 32, 2, prompt=prompt)
    world.drain()
    assert late.num_cached_tokens == 0, "what was computed before the clear is not shared"
    assert running.finish_reason is LENGTH
    after = calm(world, 32, 1, prompt=prompt)
    world.drain()
    assert after.num_cached_tokens == 31, "what was computed after it is"


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("length", [5, 16, 21])
def test_samples_share_the_blocks_of_the_prompt(length: int, prefix_caching: bool) -> None:
    world = World(prefix_caching=prefix_caching)
    leader = calm(world, length, 4, n=4)
    run(world, 1)
    assert (world.scheduler.num_running, world.scheduler.num_waiting) == (1, 3), "samples wait for the prompt"
    batch = world.schedule()
    assert batch is not None
    assert batch.lengths == [1, 1, 1, 1], "the last token alone is computed again"
    shared = (length - 1) // 8
    tables = [world.blocks.table(slot)[:shared] for slot in batch.slots]
    assert tables == [tables[0]] * 4
    assert len(batch.copy_sources) == 3 * bool((length - 1) % 8)
    world.update()
    world.drain()
    assert world.runner.num_computed == length + 3 + 4 * 3
    samples = [request for request in world.requests if request.request_id == leader.request_id]
    assert [len(sample.output_token_ids) for sample in samples] == [len(expected(sample)[0]) for sample in samples]


def test_a_sample_whose_leader_is_gone_computes_or_hits() -> None:
    world = World(max_num_seqs=1)
    leader = calm(world, 20, 3, n=2)
    world.drain()
    [sample] = [request for request in world.requests if request.leader is leader]
    assert sample.num_cached_tokens == 16
    world = World(max_num_seqs=1, prefix_caching=False)
    leader = calm(world, 20, 3, n=2)
    world.drain()
    [sample] = [request for request in world.requests if request.leader is leader]
    assert sample.num_cached_tokens == 0


def test_aborting_a_request_ends_all_its_samples() -> None:
    world = World()
    leader = calm(world, 9, 9, n=3)
    run(world, 2)
    world.schedule()
    assert world.abort(leader)
    assert {request.finish_reason for request in world.requests} == {ABORT}
    world.drain()


def test_one_sample_can_end_alone() -> None:
    world = World()
    leader = calm(world, 9, 9, n=2)
    run(world, 3)
    world.finish(leader)
    [sample] = [request for request in world.requests if request.leader is leader]
    world.drain()
    assert len(sample.output_token_ids) == len(expected(sample)[0])


def test_a_request_waits_for_one_that_computes_its_prefix() -> None:
    prompt = list(range(64))
    computed = {}
    for aware in (True, False):
        world = World(prefix_aware=aware, max_model_len=100, budget=300)
        for tail in range(3):
            calm(world, 65, 1, prompt=[*prompt, tail])
        other = calm(world, 30, 1)
        run(world, 1)
        assert other.first_token_time is not None, "others are not held up"
        world.drain()
        computed[aware] = world.runner.num_computed
        assert len(events(world, "held")) == (2 if aware else 0)
    assert computed == {True: 65 + 30 + 2, False: 3 * 65 + 30}


def test_nobody_waits_for_a_small_part_of_his_prompt() -> None:
    world = World(budget=200, max_model_len=100)
    shared = list(range(16))
    calm(world, 60, 1, prompt=[*shared, *range(100, 144)])
    calm(world, 60, 1, prompt=[*shared, *range(200, 244)])
    batch = world.schedule()
    assert batch is not None
    assert batch.lengths == [60, 60]
    world.drain()


def test_held_requests_go_on_when_the_one_they_wait_for_ends() -> None:
    world = World(budget=16)
    prompt = list(range(50))
    first = calm(world, 50, 3, prompt=prompt)
    second = calm(world, 50, 3, prompt=prompt)
    world.schedule()
    world.update()
    assert second.slot is None
    world.abort(first)
    world.drain()
    assert second.finish_reason is LENGTH
    assert second.num_cached_tokens == 16, "what the other had computed"


def test_admission_goes_by_likely_lengths_not_by_promises() -> None:
    """16 blocks: by max_tokens only two requests of 7 blocks fit at once; by the answers seen, many do."""
    world = World(num_blocks=16, max_num_seqs=8)
    for _ in range(20):
        world.scheduler._running.admission._lengths.record(4)
    for _ in range(8):
        calm(world, 8, 48)
    world.schedule()
    assert world.scheduler.num_running > 4
    world.drain()
    careful = World(num_blocks=16, max_num_seqs=8)
    for _ in range(8):
        calm(careful, 8, 48)
    careful.schedule()
    assert careful.scheduler.num_running == 2, "nothing is known of answers yet"
    careful.drain()
    assert events(careful, "preempted") == []


def test_what_certainly_gets_long_is_not_guessed() -> None:
    world = World(num_blocks=16, max_num_seqs=8)
    expect_short_answers(world.scheduler)
    for _ in range(8):
        calm(world, 8, 48, ignore_eos=True)
    world.schedule()
    assert world.scheduler.num_running == 2
    world.drain()


def storm(policy: str = "fcfs") -> World:
    """32 blocks, and 8 requests that will need 15 each while admission believes in 1."""
    world = World(num_blocks=32, max_num_seqs=8, budget=64, max_model_len=130, policy=policy)
    expect_short_answers(world.scheduler)
    return world


def test_a_preemption_storm_ends_and_everybody_gets_his_answer() -> None:
    world = storm()
    requests = [calm(world, 10, 110) for _ in range(8)]
    world.drain()
    preempted = [request.num_preemptions for request in requests]
    assert sum(preempted) >= 3
    assert preempted[0] == 0, "the first to come is never preempted"
    ends = [request.finish_time for request in requests]
    assert ends == sorted(ends, key=float), "first come, first served"
    assert sum(preempted) < 50


def test_the_least_urgent_latest_request_is_preempted_and_hits_its_own_prefix() -> None:
    world = storm("priority")
    urgencies = [1, 0, 2, 0, 2, 1]
    requests = [calm(world, 10, 110, priority=priority) for priority in urgencies]
    while not events(world, "preempted"):
        world.schedule()
        world.update()
    [victim] = [label for name, label, _ in world.events if name == "preempted"]
    assert victim == "r4", "of the lowest urgency the latest"
    assert requests[4].slot is None
    world.drain()
    again = [facts for name, label, facts in world.events if (name, label) == ("admitted", "r4") and facts["again"]]
    assert again
    assert requests[4].num_cached_tokens == 0, "the first admission counts"
    ends = sorted(requests, key=lambda request: (request.finish_time, request.arrival_number))
    assert [request.priority for request in ends] == sorted(urgencies)


def test_a_preempted_request_computes_only_what_was_evicted() -> None:
    world = World(num_blocks=8, max_num_seqs=2)
    expect_short_answers(world.scheduler)
    calm(world, 16, 30)
    second = calm(world, 16, 30)
    world.drain()
    assert second.num_preemptions >= 1
    again = [facts for name, _, facts in world.events if name == "admitted" and facts["again"]]
    assert any(facts["cached_tokens"] for facts in again)


def test_priority_goes_first_and_equals_keep_their_order() -> None:
    world = World(max_num_seqs=1, policy="priority")
    priorities = [5, 1, 5, 0, 1, 0, -3]
    requests = [calm(world, 4, 2, priority=priority) for priority in priorities]
    world.drain()
    order = sorted(requests, key=lambda request: (request.finish_time, request.arrival_number))
    assert [requests.index(request) for request in order] == [6, 3, 5, 1, 4, 0, 2]


def test_an_urgent_prompt_overtakes_one_that_was_begun() -> None:
    world = World(budget=8, policy="priority")
    slow = calm(world, 40, 2, priority=1)
    run(world, 1)
    urgent = calm(world, 8, 2, priority=0)
    run(world, 1)
    assert urgent.first_token_time is not None
    assert (slow.num_scheduled, slow.slot) == (8, 0)
    world.drain()


def test_fcfs_ignores_priority() -> None:
    world = World(max_num_seqs=1)
    requests = [calm(world, 4, 2, priority=priority) for priority in (2, 1, 0)]
    world.drain()
    ends = [request.finish_time for request in requests]
    assert ends == sorted(ends, key=float)


def test_nobody_starves_behind_a_stream_of_small_requests() -> None:
    world = World(num_blocks=16, max_num_seqs=4, max_model_len=129, budget=32)
    for _ in range(4):
        calm(world, 8, 12)
    run(world, 2)
    large = calm(world, 64, 60)
    for _ in range(60):
        calm(world, 8, 12)
        run(world, 4)
        if large.first_token_time is not None:
            break
    assert large.first_token_time is not None
    world.drain()


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    world = World(max_num_seqs=1)
    running, waiting = calm(world, 8, 40, timeout=5.0), calm(world, 8, 40, timeout=3.0)
    calm(world, 8, 2)
    world.drain()
    assert (running.finish_reason, waiting.finish_reason) == (TIMEOUT, TIMEOUT)
    assert len(running.output_token_ids) == 5
    assert waiting.output_token_ids == []


def test_a_full_queue_refuses_and_takes_again() -> None:
    world = World(max_num_seqs=1, max_num_waiting=2)
    calm(world, 8, 3)
    run(world, 1)
    calm(world, 8, 3)
    calm(world, 8, 3)
    with pytest.raises(QueueFullError, match="2 requests wait already and at most 2 may"):
        world.scheduler.add([world.make(8, 3)])
    run(world, 4)
    calm(world, 8, 3)
    world.drain()


def test_an_empty_queue_takes_a_request_of_more_samples_than_it_holds() -> None:
    world = World(max_num_seqs=2, max_num_waiting=2)
    calm(world, 8, 3, n=5)
    with pytest.raises(QueueFullError):
        world.scheduler.add([world.make(8, 3)])
    world.drain()


def test_a_request_that_can_never_fit_is_told_what_would() -> None:
    world = World(num_blocks=4)
    with pytest.raises(RequestError, match="at most 33 together fit"):
        world.scheduler.limits.most_tokens("x", 20, 30)
    assert world.scheduler.limits.most_tokens("x", 20, 13) == 13
