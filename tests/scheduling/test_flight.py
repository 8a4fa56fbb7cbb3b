"""A batch under construction: its columns say exactly what was added, and results reach those they belong to."""

from __future__ import annotations

import pytest

from minivllm.batch import Batch, BatchResult, TokenLogprobs
from minivllm.request import FinishReason
from minivllm.scheduling.flight import Chunk, Flight
from minivllm.scheduling.slot_state import slot_extras, slot_params
from tests.scheduling import make_request


def entry(logprob: float) -> TokenLogprobs:
    return TokenLogprobs(1, logprob, 1, ())


def test_a_start_tells_slot_table_and_copies() -> None:
    flight = Flight()
    plain, special = make_request([1, 2]), make_request([3], logprobs=2)
    flight.add_start(plain, 4, [], [])
    flight.add_start(special, 2, [7, 9], [(5, 9)])
    assert flight.batch == Batch(
        new_slots=[slot_params(plain, 4), slot_params(special, 2)],
        new_extras=[slot_extras(special, 2)],
        block_slots=[2, 2],
        block_indices=[0, 1],
        block_ids=[7, 9],
        copy_sources=[5],
        copy_targets=[9],
    )


def test_entries_are_columns() -> None:
    flight = Flight()
    flight.add_entries(3, [(4, 10), (5, 11)])
    flight.add_entries(1, [])
    flight.add_entries(1, [(0, 12)])
    batch = flight.batch
    assert (batch.block_slots, batch.block_indices, batch.block_ids) == ([3, 3, 1], [4, 5, 0], [10, 11, 12])


def test_decodes_come_first_and_carry_no_token() -> None:
    flight, requests = Flight(), {slot: make_request([1]) for slot in (5, 0, 2)}
    flight.add_decodes(requests, [9, 3, 4])
    batch = flight.batch
    assert (batch.slots, batch.starts, batch.lengths) == ([5, 0, 2], [9, 3, 4], [1, 1, 1])
    assert (batch.token_counts, batch.token_ids, batch.samples) == ([0, 0, 0], [], [0, 1, 2])
    assert flight.draws == list(requests.values())
    requests.clear()
    assert batch.slots == [5, 0, 2], "a flight does not follow what happens later"
    with pytest.raises(AssertionError, match="decode rows come first"):
        flight.add_decodes({}, [])


def test_chunks_carry_their_tokens_and_the_last_one_draws() -> None:
    flight, request = Flight(), make_request([10, 11, 12, 13, 14])
    decoding = make_request([1])
    flight.add_decodes({3: decoding}, [6])
    flight.add_chunk(request, 1, 2)
    request.num_scheduled = 2
    other = make_request([20])
    flight.add_chunk(other, 0, 1)
    flight.add_chunk(request, 1, 5)
    batch = flight.batch
    assert (batch.slots, batch.starts, batch.lengths) == ([3, 1, 0, 1], [6, 0, 0, 2], [1, 2, 1, 3])
    assert (batch.token_counts, batch.token_ids) == ([0, 2, 1, 3], [10, 11, 20, 12, 13, 14])
    assert batch.num_tokens == 7
    assert batch.samples == [0, 2, 3]
    assert flight.draws == [decoding, other, request]
    assert flight.chunks == [Chunk(1, request, 0, 2), Chunk(2, other, 0, 1), Chunk(3, request, 2, 5)]
    assert (batch.scored_rows, batch.scored_counts, batch.scored_targets) == ([], [], [])


def test_a_preempted_request_computes_its_answer_again() -> None:
    flight = Flight()
    request = make_request([10, 11, 12], output_token_ids=[20, 21])
    request.num_known, request.num_scheduled = 5, 1
    flight.add_chunk(request, 0, 4)
    assert (flight.batch.token_ids, flight.batch.samples) == ([11, 12, 20], [])
    request.num_scheduled = 4
    flight.add_chunk(request, 0, 5)
    assert (flight.batch.token_ids, flight.batch.samples) == ([11, 12, 20, 21], [1])


@pytest.mark.parametrize("cuts", [[5], [2, 5], [4, 5], [1, 2, 3, 4, 5]], ids=str)
@pytest.mark.parametrize("answer", [[], [20, 21, 22]], ids=str)
def test_every_prompt_token_but_the_first_is_scored_once(cuts: list[int], answer: list[int]) -> None:
    request = make_request([10, 11, 12, 13, 14], prompt_logprobs=0, output_token_ids=answer)
    request.num_known = 5 + len(answer)
    flights = []
    for stop in [*cuts[:-1], request.num_known]:
        flight = Flight()
        flight.add_chunk(make_request([1, 2]), 7, 2)  # wants nothing
        flight.add_chunk(request, 0, stop)
        request.num_scheduled = stop
        flights.append(flight.batch)
    assert [token for batch in flights for token in batch.scored_targets] == [11, 12, 13, 14]
    for batch in flights:
        assert batch.scored_rows == ([1] if batch.scored_targets else [])
        assert batch.scored_counts == ([len(batch.scored_targets)] if batch.scored_targets else [])
        for token, target in zip(batch.token_ids[2:], batch.scored_targets, strict=False):
            assert target == token + 1, "the target is what follows the query token"


def test_what_was_told_already_is_not_scored_again() -> None:
    flight, request = Flight(), make_request([10, 11, 12], prompt_logprobs=0)
    request.prompt_logprobs = [entry(-1.0)] * 2
    flight.add_chunk(request, 0, 3)
    assert flight.batch.scored_rows == []


def test_logprobs_and_embeddings_reach_their_requests() -> None:
    asks, best, ended = make_request([1], logprobs=1), make_request([1], best_of=2), make_request([1], logprobs=1)
    embeds = make_request([1], pooling="last")
    flight = Flight(draws=[asks, best, ended, embeds])
    ended.finish_reason = FinishReason.ABORT
    flight.keep_extras(BatchResult([1] * 4, logprobs={0: entry(-0.5), 1: entry(-1.0), 2: entry(-2.0)}))
    flight.keep_extras(BatchResult([1] * 4, logprobs={0: entry(-0.25)}, embeddings={3: [1.0, 2.0]}))
    assert (asks.logprobs, asks.cumulative_logprob) == ([entry(-0.5), entry(-0.25)], -0.75)
    assert (best.logprobs, best.cumulative_logprob) == ([], -1.0), "summed for the choice, not told"
    assert (ended.logprobs, ended.cumulative_logprob) == ([], 0.0)
    assert (embeds.embedding, asks.embedding) == ([1.0, 2.0], None)
