"""Logprobs, prompt logprobs and embeddings: which batch asks for them, and that each request gets its own."""

from __future__ import annotations

from minivllm.batch import BatchResult, TokenLogprobs
from tests.scheduler_world import LENGTH, World, calm


def test_logprobs_and_embeddings_go_to_their_requests() -> None:
    world = World(budget=8)
    request = calm(world, 20, 3, prompt_logprobs=0, logprobs=1, n=1)
    scored = []
    for _ in range(3):
        batch = world.scheduler.schedule()
        assert batch is not None
        assert batch.scored_rows == [0]
        scored += batch.scored_targets
        result = BatchResult([5] * len(batch.samples))
        result.prompt_logprobs = {0: [TokenLogprobs(token, -1.0, 1, ()) for token in batch.scored_targets]}
        if batch.samples:
            result.logprobs = {0: TokenLogprobs(5, -0.5, 2, ((9, -0.1),))}
            result.embeddings = {0: [1.0, 2.0]}
        world.scheduler.update(batch, result)
    assert scored == request.prompt_token_ids[1:]
    assert [entry.token_id for entry in request.prompt_logprobs] == scored
    assert request.logprobs == [TokenLogprobs(5, -0.5, 2, ((9, -0.1),))]
    assert (request.cumulative_logprob, request.embedding) == (-0.5, [1.0, 2.0])


def test_prompt_logprobs_of_a_request_that_ends_with_its_first_token() -> None:
    world = World()
    request = calm(world, 3, 1, prompt_logprobs=0)
    batch = world.scheduler.schedule()
    assert batch is not None
    result = BatchResult([5])
    result.prompt_logprobs = {0: [TokenLogprobs(token, -1.0, 1, ()) for token in batch.scored_targets]}
    world.scheduler.update(batch, result)
    assert request.finish_reason is LENGTH
    assert len(request.prompt_logprobs) == 2


def test_prompt_logprobs_are_told_by_one_sample_for_all() -> None:
    world = World()
    leader = calm(world, 20, 3, n=3, prompt_logprobs=1)
    world.drain()
    assert [request.num_cached_tokens for request in world.requests if request.leader is leader] == [19, 19]


def test_prompt_logprobs_need_every_token_computed() -> None:
    world = World()
    prompt = list(range(30))
    calm(world, 30, 1, prompt=prompt)
    world.drain()
    scored, pooled = (
        calm(world, 30, 1, prompt=prompt, prompt_logprobs=2),
        calm(world, 30, 1, prompt=prompt, pooling="mean"),
    )
    last = calm(world, 30, 1, prompt=prompt, pooling="last")
    world.drain()
    assert (scored.num_cached_tokens, pooled.num_cached_tokens, last.num_cached_tokens) == (0, 0, 24)
