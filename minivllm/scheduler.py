"""Which requests run in the next step, and what its results mean: all policy of the engine.

Each step every decoding request gets one token, then prompts share what is left of the token budget, oldest first.
State moves on when a batch is scheduled, not when its tokens come back, so step n + 1 can be scheduled while step n
computes: a decode row needs no known token. Results of a request that turns out to have ended are dropped.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minivllm.batch import Batch, SlotParams
from minivllm.cache.block_manager import BlockManager
from minivllm.errors import RequestError
from minivllm.request import FinishReason, Request


class StepOutput(NamedTuple):
    """What one step gave one request: a token, an end, or both. token_id is None where the logits were no numbers."""

    request_id: str
    token_id: int | None
    finish_reason: FinishReason | None


@dataclass(slots=True)
class _Flight:
    """A batch that was scheduled and whose tokens have not come back.

    draws: the requests of batch.samples, in that order.
    leaving: slot -> request that no later batch contains; its slot and blocks are given back when this one lands.
    """

    batch: Batch = field(default_factory=Batch)
    draws: list[Request] = field(default_factory=list)
    leaving: dict[int, Request] = field(default_factory=dict)


class Scheduler:
    """Continuous batching under a token budget, first come first served, with chunked prompts.

    A request is admitted only when the cache has room for all that it and every running request can ever need.
    max_num_seqs: most requests that hold a slot at once. max_num_batched_tokens: most query tokens of a step, at least
    max_num_seqs. max_model_len: most tokens of a prompt and its answer together. clock: seconds, for the metrics.

    A request with a slot is in exactly one of three places, and each batch contains every request of the first two:
    `_prefilling` (at most one: a prompt is cut only where the budget of a step ends), `_decoding`, or the `leaving` of
    the last flight that contains it. Hence that flight alone decides when a slot can be given to another request.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert 1 <= max_num_seqs <= max_num_batched_tokens, "a step must hold one token of every running request"
        self._blocks = block_manager
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._clock = clock
        self._requests: dict[str, Request] = {}  # all that have not ended
        self._waiting: OrderedDict[str, Request] = OrderedDict()  # oldest first
        self._prefilling: Request | None = None
        self._decoding: dict[int, Request] = {}  # slot -> request
        self._flights: deque[_Flight] = deque()  # oldest first
        self._free_slots = list(range(max_num_seqs - 1, -1, -1))

    @property
    def has_unfinished(self) -> bool:
        """Whether a request has not ended or a batch has not come back."""
        return bool(self._requests or self._flights)

    @property
    def num_running(self) -> int:
        """Requests that have a slot and have not ended."""
        return len(self._requests) - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Queue `request`, its max_tokens lowered to what the context length leaves.

        Raises RequestError for an id that is in use, an empty prompt, a prompt that leaves no room for an answer, and
        a request that the whole cache could not hold.
        """
        name, length = request.request_id, len(request.prompt_token_ids)
        if name in self._requests:
            raise RequestError(f"request id {name!r} is in use; give every request its own")
        if not 1 <= length < self._max_model_len:
            raise RequestError(
                f"the prompt of request {name!r} has {length} tokens; it must have from 1 to "
                f"{self._max_model_len - 1}, as max_model_len is {self._max_model_len} and holds prompt and answer"
            )
        max_tokens = min(request.max_tokens, self._max_model_len - length)
        num_to_schedule = length + max_tokens - 1
        if num_to_schedule > self._blocks.num_tokens:
            raise RequestError(
                f"request {name!r} has a prompt of {length} tokens and max_tokens {max_tokens}, but at most "
                f"{self._blocks.num_tokens + 1} together fit the KV cache; shorten the prompt, lower max_tokens, or "
                f"give the cache more blocks"
            )
        request.max_tokens = max_tokens
        request.num_to_schedule = num_to_schedule
        request.arrival_time = self._clock()
        self._requests[name] = self._waiting[name] = request

    def abort(self, request_id: str) -> bool:
        """End a request at once; False where the id is unknown or has ended.

        True is the whole report: no `StepOutput` of this request follows. Its slot and blocks are given back when no
        batch that is out contains it.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request, FinishReason.ABORT, self._clock())
        return True

    def schedule(self) -> Batch | None:
        """The next batch; None where nothing can be computed before a batch that is out comes back, or at all."""
        flight = _Flight()
        self._schedule_decodes(flight)
        self._schedule_prompts(flight)
        if not flight.batch.slots:
            return None
        self._flights.append(flight)
        return flight.batch

    def update(self, batch: Batch, token_ids: Sequence[int]) -> list[StepOutput]:
        """Take the tokens drawn in `batch`, one for each of batch.samples, -1 where the logits were no numbers.

        Batches come back in the order in which they were scheduled. Returns an entry for each request that got a token
        or ended.
        """
        flight = self._flights.popleft()
        assert flight.batch is batch, "batches come back in the order in which they were scheduled"
        assert len(token_ids) == len(flight.draws), f"{len(token_ids)} tokens for {len(flight.draws)} rows that draw"
        now = self._clock()
        outputs = []
        for request, token in zip(flight.draws, token_ids, strict=True):
            if request.finish_reason is not None:  # it ended while this batch was out
                continue
            drawn = request.output_token_ids
            if token < 0:
                self._end(request, FinishReason.ERROR, now)
                outputs.append(StepOutput(request.request_id, None, FinishReason.ERROR))
                continue
            if not drawn:
                request.first_token_time = now
            drawn.append(token)
            if token in request.stop_ids:
                self._end(request, FinishReason.STOP, now)
            elif len(drawn) == request.max_tokens:
                self._end(request, FinishReason.LENGTH, now)
            outputs.append(StepOutput(request.request_id, token, request.finish_reason))
        for slot, request in flight.leaving.items():
            self._release(slot, request)
        return outputs

    def _schedule_decodes(self, flight: _Flight) -> None:
        """One token for every decoding request; the hot path, some 0.1 us a row."""
        batch, count = flight.batch, len(self._decoding)
        offset_mask = self._blocks.block_size - 1
        for slot, request in self._decoding.items():
            position = request.num_scheduled
            batch.starts.append(position)
            request.num_scheduled = position + 1
            if not position & offset_mask:
                self._grow(batch, slot, position + 1)
            if position + 1 == request.num_to_schedule:
                flight.leaving[slot] = request
        batch.slots = list(self._decoding)
        batch.lengths = [1] * count
        batch.token_counts = [0] * count
        batch.samples = list(range(count))
        flight.draws = list(self._decoding.values())
        for slot in flight.leaving:
            del self._decoding[slot]

    def _schedule_prompts(self, flight: _Flight) -> None:
        """Spend what is left of the budget on the prompt that was begun, then on the queue, oldest first."""
        budget = self._max_num_batched_tokens - len(flight.batch.slots)
        while budget > 0:
            request = self._prefilling or self._admit(flight.batch)
            if request is None:
                return
            budget -= self._schedule_chunk(flight, request, budget)

    def _admit(self, batch: Batch) -> Request | None:
        """Give the oldest waiting request a slot, if there is one and the cache is sure to hold its every token."""
        if not self._waiting or not self._free_slots:
            return None
        request = next(iter(self._waiting.values()))
        if not self._blocks.can_reserve(request.num_to_schedule):
            return None
        del self._waiting[request.request_id]
        slot = self._free_slots.pop()
        request.slot = slot
        self._blocks.reserve(slot, request.num_to_schedule)
        params = request.params
        batch.new_slots.append(
            SlotParams(slot, params.temperature, params.top_k, params.top_p, params.min_p, request.seed)
        )
        return request

    def _schedule_chunk(self, flight: _Flight, request: Request, budget: int) -> int:
        """Add the next `budget` prompt tokens of `request`, or as many as are left; returns their number."""
        batch, slot = flight.batch, _slot(request)
        start, prompt = request.num_scheduled, request.prompt_token_ids
        stop = min(start + budget, len(prompt))
        batch.slots.append(slot)
        batch.starts.append(start)
        batch.lengths.append(stop - start)
        batch.token_counts.append(stop - start)
        batch.token_ids += prompt[start:stop]
        self._grow(batch, slot, stop)
        request.num_scheduled = stop
        if stop < len(prompt):
            self._prefilling = request
            return stop - start
        self._prefilling = None
        batch.samples.append(len(batch.slots) - 1)
        flight.draws.append(request)
        home = flight.leaving if stop == request.num_to_schedule else self._decoding
        home[slot] = request
        return stop - start

    def _grow(self, batch: Batch, slot: int, num_tokens: int) -> None:
        for index, block in self._blocks.grow(slot, num_tokens):
            batch.block_slots.append(slot)
            batch.block_indices.append(index)
            batch.block_ids.append(block)

    def _end(self, request: Request, reason: FinishReason, now: float) -> None:
        """End `request`; what it holds is given back when the last flight that contains it lands."""
        request.finish_reason = reason
        request.finish_time = now
        del self._requests[request.request_id]
        if request.slot is None:
            del self._waiting[request.request_id]
        elif request.num_scheduled < request.num_to_schedule:  # else it is leaving already
            if self._prefilling is request:
                self._prefilling = None
            else:
                del self._decoding[request.slot]
            if self._flights:
                self._flights[-1].leaving[request.slot] = request
            else:
                self._release(request.slot, request)

    def _release(self, slot: int, request: Request) -> None:
        self._blocks.release(slot)
        self._free_slots.append(slot)
        request.slot = None

    def check(self) -> None:
        """Assert every invariant of the scheduler and the cache. O(cache size); for tests and debugging."""
        held = list(self._decoding.items())
        held += [(_slot(self._prefilling), self._prefilling)] if self._prefilling else []
        held += [item for flight in self._flights for item in flight.leaving.items()]
        slots = [slot for slot, _ in held]
        assert sorted(slots + self._free_slots) == list(range(self._max_num_seqs)), "a slot is lost, or held twice"
        assert all(request.slot == slot for slot, request in held), "a request does not know its slot"
        live = [request.request_id for _, request in held if request.finish_reason is None] + list(self._waiting)
        assert len(live) == len(set(live)), "a request is in two places"
        assert set(live) == self._requests.keys(), "a request is nowhere"
        for slot, request in held:
            assert request.num_scheduled <= request.num_to_schedule, f"slot {slot} was scheduled past its end"
            rooms = len(self._blocks.table(slot)) * self._blocks.block_size
            assert 0 <= rooms - request.num_scheduled < self._blocks.block_size, f"slot {slot} has unfit blocks"
        self._blocks.check(slots)


def _slot(request: Request) -> int:
    assert request.slot is not None, f"request {request.request_id!r} has no slot"
    return request.slot
