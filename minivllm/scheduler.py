"""Which requests run in the next step, and what its results mean: all policy of the engine.

Each step every decoding request gets one token, then prompts share what is left of the token budget, the most urgent
first. State moves on when a batch is scheduled, not when its tokens come back, so step n + 1 can be scheduled while
step n computes: a decode row needs no known token. Results of a request that turns out to have ended are dropped. When
the cache is full, the least urgent request gives its blocks back and is computed again later.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from minivllm.batch import Batch, BatchResult
from minivllm.cache.block_manager import BlockManager, Prefix
from minivllm.cache.radix_tree import token_key
from minivllm.errors import RequestError
from minivllm.lazy_heap import LazyHeap
from minivllm.request import FinishReason, Request, StepOutput
from minivllm.scheduling.flight import Chunk, Flight
from minivllm.scheduling.limits import Limits
from minivllm.scheduling.prefixes import best_prefix, computed_by_another
from minivllm.scheduling.running_set import RunningSet, full_key, num_tokens_of, slot_of
from minivllm.scheduling.waiting_queue import WaitingQueue

Observer = Callable[[str, "str | None", Mapping[str, object]], None]
"""Is told (event, label of a request or None, facts): see `Scheduler._tell`'s callers for the events."""


class Scheduler:
    """Continuous batching under a token budget, with chunked prompts, shared prefixes and preemption.

    max_num_seqs: most requests that hold a slot at once. max_num_batched_tokens: most query tokens of a step, at least
    max_num_seqs. max_model_len: most tokens of a prompt and its answer together. policy: "fcfs", or "priority": lower
    first, then by arrival. prefix_aware: a waiting request whose prompt mostly equals one that is being computed waits
    for that instead of computing it twice. max_num_waiting: bound of the queue; None: none. clock: seconds.

    A request that has not ended is in exactly one place: the waiting queue, `_prefilling`, `_decoding`, or, once all of
    it was scheduled, the `leaving` of the last flight that contains it. A request that ended with a slot is in the
    `leaving` of the last flight: only then can no batch that is out write to its blocks.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        policy: str = "fcfs",
        prefix_aware: bool = True,
        max_num_waiting: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer | None = None,
    ) -> None:
        assert 1 <= max_num_seqs <= max_num_batched_tokens, "a step must hold one token of every running request"
        self._blocks = block_manager
        self._max_num_batched_tokens = max_num_batched_tokens
        self.limits = Limits(max_model_len, block_manager.num_tokens, max_num_waiting)
        self._prefix_aware = prefix_aware and block_manager.prefix_caching
        self._clock = clock
        self._observer = observer
        self._requests: dict[str, list[Request]] = {}  # all that have not ended
        self._num_live = self._num_arrived = self._num_steps = 0
        self._waiting = WaitingQueue(policy)
        self._deadlines: LazyHeap[Request] = LazyHeap()
        self._running = RunningSet(block_manager, max_num_seqs)
        self._flights: deque[Flight] = deque()  # oldest first
        self._shortage = 0  # blocks that must come back before the most urgent waiting request is looked at again

    @property
    def has_unfinished(self) -> bool:
        """Whether a request has not ended or a batch has not come back."""
        return bool(self._requests or self._flights)

    @property
    def num_running(self) -> int:
        """Sequences that have a slot and have not ended."""
        return self._num_live - len(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that have no slot yet, or none any more."""
        return len(self._waiting)

    def add(self, samples: Sequence[Request]) -> None:
        """Queue one request: all its samples, of which the first is the leader of the others.

        Raises RequestError for an id that is in use and for what can never fit (`Limits`), and QueueFullError.
        """
        leader = samples[0]
        name = leader.request_id
        if name in self._requests:
            raise RequestError(f"request id {name!r} is in use; give every request its own")
        length = len(leader.prompt_token_ids)
        max_tokens = self.limits.most_tokens(name, length, leader.max_tokens)
        self.limits.check_queue(len(self._waiting), len(samples))
        leader.key = token_key(leader.prompt_token_ids)
        now = self._clock()
        for request in samples:
            request.max_tokens, request.num_to_schedule = max_tokens, length + max_tokens - 1
            request.key, request.num_known = leader.key, length
            request.arrival_time, request.arrival_number = now, self._num_arrived
            self._num_arrived += 1
            if request.params.timeout is not None:
                request.deadline = now + request.params.timeout
                self._deadlines.push(request, request.deadline)
            self._tell("queued", request, prompt_tokens=length, max_tokens=max_tokens, priority=request.priority)
        self._requests[name] = list(samples)
        self._num_live += len(samples)
        self._waiting.push(leader)
        for request in samples[1:]:
            self._waiting.hold(request, leader)
        if self._waiting.peek() is leader:
            self._shortage = 0

    def abort(self, request_id: str) -> bool:
        """End all samples of a request at once; False where the id is unknown or has ended.

        True is the whole report: no `StepOutput` of this request follows. Slots and blocks are given back when no batch
        that is out contains it.
        """
        samples = self._requests.get(request_id)
        for request in list(samples or ()):
            self.finish(request, FinishReason.ABORT)
        return samples is not None

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End one sequence that has not ended, for a reason outside of the scheduler. No `StepOutput` of it follows."""
        assert request.finish_reason is None, f"{request.label} has ended"
        self._end(request, reason, self._clock())

    def expire(self) -> list[StepOutput]:
        """End the requests whose deadline has passed; to be called before each `schedule`."""
        outputs: list[StepOutput] = []
        now = self._clock()
        while (request := self._deadlines.peek()) is not None and request.deadline is not None:
            if request.deadline > now:
                break
            self._end(request, FinishReason.TIMEOUT, now)
            outputs.append(StepOutput(request.request_id, request.index, None, FinishReason.TIMEOUT))
        return outputs

    def clear_cache(self) -> None:
        """Forget all cached prefixes; what runs goes on, and nothing computed before now is shared later."""
        self._blocks.clear()
        self._shortage = 0
        self._tell("cleared", None)

    def schedule(self) -> Batch | None:
        """The next batch; None where nothing can be computed before a batch that is out comes back, or at all."""
        if not self._make_room():
            return None
        flight = Flight()
        self._schedule_decodes(flight)
        self._schedule_prompts(flight)
        while not flight.batch.slots and not self._flights and len(self._running.prefilling) > 1:
            self._preempt(self._running.prefilling[-1], "prompts that were begun hold each other's blocks")
            self._schedule_prompts(flight)
        if not flight.batch.slots:
            return None
        self._running.add_changes(flight)
        self._num_steps += 1
        self._shortage -= not self._num_steps % self._blocks.block_size  # see `Admission.shortage`
        self._flights.append(flight)
        return flight.batch

    def update(self, batch: Batch, result: BatchResult) -> list[StepOutput]:
        """Take what came of `batch`. Batches come back in the order in which they were scheduled.

        Returns an entry for each sequence that got a token or ended.
        """
        flight = self._flights.popleft()
        assert flight.batch is batch, "batches come back in the order in which they were scheduled"
        ids = result.token_ids
        assert len(ids) == len(flight.draws), f"{len(ids)} tokens for {len(flight.draws)} rows that draw"
        if result.logprobs or result.embeddings:
            flight.keep_extras(result)
        now = self._clock()
        outputs: list[StepOutput] = []
        new = tuple.__new__
        for request, token in zip(flight.draws, ids, strict=True):
            if request.finish_reason is not None:  # it ended while this batch was out
                continue
            drawn = request.output_token_ids
            if token < 0:
                self._end(request, FinishReason.ERROR, now)
                outputs.append(StepOutput(request.request_id, request.index, None, FinishReason.ERROR))
                continue
            if not drawn:
                request.first_token_time = now
                self._tell("first_token", request)
            drawn.append(token)
            if token in request.stop_ids:
                self._end(request, FinishReason.STOP, now)
            elif len(drawn) == request.max_tokens:
                self._end(request, FinishReason.LENGTH, now)
            # tuple.__new__ makes the same tuple in half the time; a step has hundreds.
            outputs.append(new(StepOutput, (request.request_id, request.index, token, request.finish_reason)))
        for chunk in flight.chunks:
            self._land(chunk, result)
        for slot, request in flight.leaving.items():
            self._release(slot, request)
        return outputs

    def _make_room(self) -> bool:
        """See that every decode row can have its next block, by preemption if need be.

        False where that must wait for a batch that is out, as it still writes to the blocks of those it contains.
        """
        if self._blocks.num_available >= len(self._running.decoding):
            return True
        offset_mask = self._blocks.block_size - 1
        while True:
            needed = sum(not request.num_scheduled & offset_mask for request in self._running.decoding.values())
            if needed <= self._blocks.num_available:
                return True
            if self._flights:
                return False
            running = self._running.requests()
            assert len(running) > 1, "a request alone does not fit the cache"
            why = f"{needed} decoding requests need a block and {self._blocks.num_available} are left"
            self._preempt(max(running, key=self._waiting.urgency), why)

    def _preempt(self, request: Request, why: str) -> None:
        """Take slot and blocks from `request`, which no batch that is out contains, and let it wait again."""
        slot = slot_of(request)
        self._tell(
            "preempted", request, why=why, computed_tokens=request.num_scheduled, blocks=self._blocks.table_length(slot)
        )
        self._running.take_out(request)
        self._release(slot, request)
        request.num_scheduled = 0
        request.num_preemptions += 1
        request.key, request.num_known = full_key(request), num_tokens_of(request)
        self._waiting.push(request)
        self._waiting.wake(request)
        # Let the others get on first: else it could come back at once and be preempted again.
        self._shortage = self._running.admission.most_given_back(request)

    def _schedule_decodes(self, flight: Flight) -> None:
        """One token for every decoding request; the hot path, some 0.1 us a row."""
        decoding, leaving = self._running.decoding, flight.leaving
        offset_mask = self._blocks.block_size - 1
        starts = [request.num_scheduled for request in decoding.values()]
        grown, evicted = [], self._blocks.stats.evicted_blocks
        for request, position in zip(decoding.values(), starts, strict=True):
            request.num_scheduled = stop = position + 1
            if not position & offset_mask:
                grown.append(slot_of(request))
            if stop == request.num_to_schedule:
                leaving[slot_of(request)] = request
        flight.add_decodes(decoding, starts)
        flight.add_blocks(grown, [self._blocks.append(slot) for slot in grown])
        self._tell_evicted(evicted, "decoding requests grew")
        for slot in leaving:
            del decoding[slot]
        self._running.admission.begin_step()

    def _schedule_prompts(self, flight: Flight) -> None:
        """Spend what is left of the budget on prompts, the most urgent first, whether begun or waiting."""
        budget = self._max_num_batched_tokens - len(flight.batch.slots)
        begun, self._running.prefilling = self._running.prefilling, []
        while budget > 0:
            request = self._next_prompt(flight, begun)
            if request is None:
                break
            budget -= self._schedule_chunk(flight, request, budget)
        self._running.prefilling = sorted(self._running.prefilling + begun, key=self._waiting.urgency)

    def _next_prompt(self, flight: Flight, begun: list[Request]) -> Request | None:
        """The most urgent of the prompts that were begun and the waiting ones that can start."""
        head = self._waiting.peek()
        first = begun[0] if begun else None
        if head is not None and (first is None or self._waiting.urgency(head) < self._waiting.urgency(first)):
            started = self._admit(flight, begun)
            if started is not None:
                return started
        return begun.pop(0) if begun else None

    def _admit(self, flight: Flight, begun: list[Request]) -> Request | None:
        """Give the most urgent waiting request that waits for nobody a slot, if there is one and the cache has room."""
        blocks = self._blocks
        while self._running.has_free_slot and (self._shortage <= 0 or self._running.is_idle):
            request = self._waiting.peek()
            if request is None:
                return None
            prefix = best_prefix(request, blocks, self._running.computing)
            ahead = computed_by_another(request, prefix, self._running.computing, blocks.block_size, self._prefix_aware)
            if ahead is not None:
                self._waiting.hold(request, ahead.leader)
                self._tell("held", request, **{"for": ahead.leader.label, "shared_tokens": ahead.num_tokens})
                continue
            prefilling = (*self._running.prefilling, *begun)
            self._shortage = self._running.admission.shortage(request, prefix, self._running.decoding, prefilling)
            if self._shortage > 0:
                return None
            self._start(flight, request, prefix)
            return request
        return None

    def _start(self, flight: Flight, request: Request, prefix: Prefix) -> None:
        again, stats = request.num_preemptions > 0, self._blocks.stats
        evicted = stats.evicted_blocks
        self._waiting.remove(request)
        self._running.start(flight, request, prefix)
        self._tell_evicted(evicted, f"{request.label} copied a block that it shares and goes on in")
        if not again:
            request.num_cached_tokens = prefix.num_tokens
            stats.prompt_tokens += len(request.prompt_token_ids)
            stats.cached_tokens += prefix.num_tokens
        waited = self._clock() - request.arrival_time
        facts = {"slot": request.slot, "cached_tokens": prefix.num_tokens, "waited_s": waited, "again": again}
        self._tell("admitted", request, **facts)

    def _schedule_chunk(self, flight: Flight, request: Request, budget: int) -> int:
        """Add the next known tokens of `request`: `budget` of them, or what is left, or what the cache has room for."""
        slot, start, blocks = slot_of(request), request.num_scheduled, self._blocks
        room = (blocks.table_length(slot) + blocks.num_available) * blocks.block_size
        stop = min(start + budget, request.num_known, room)
        if stop == start:
            self._running.prefilling.append(request)
            return 0
        flight.add_chunk(request, slot, stop)
        evicted = blocks.stats.evicted_blocks
        flight.add_entries(slot, blocks.grow(slot, stop))
        self._tell_evicted(evicted, f"{request.label} grew to {stop} tokens")
        self._tell("chunk", request, start=start, stop=stop, of=request.num_known)
        request.num_scheduled = stop
        if stop < request.num_known:
            self._running.prefilling.append(request)
        elif stop == request.num_to_schedule:
            flight.leaving[slot] = request
        else:
            self._running.decoding[slot] = request
        return stop - start

    def _land(self, chunk: Chunk, result: BatchResult) -> None:
        """A piece of a prompt is computed: others may share it from now on."""
        request = chunk.request
        if chunk.row in result.prompt_logprobs:
            request.prompt_logprobs[chunk.start :] = result.prompt_logprobs[chunk.row]
        if request.finish_reason is not None:  # `_release` keeps what it computed
            return
        self._running.computed(request, chunk.stop)
        self._waiting.wake(request)

    def _end(self, request: Request, reason: FinishReason, now: float) -> None:
        """End `request`; what it holds is given back when the last flight that contains it lands."""
        request.finish_reason = reason
        request.finish_time = now
        samples = self._requests[request.request_id]
        samples.remove(request)
        if not samples:
            del self._requests[request.request_id]
        self._num_live -= 1
        self._deadlines.discard(request)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._running.admission.ended(request)
        self._tell("finished", request, reason=reason.value, output_tokens=len(request.output_token_ids))
        slot = request.slot
        if slot is None:
            self._waiting.remove(request)
            self._shortage = 0
        elif request.num_scheduled < request.num_to_schedule:  # else it is leaving already
            self._running.take_out(request)
            if self._flights:
                self._flights[-1].leaving[slot] = request
            else:
                self._release(slot, request)
        self._running.computing.pop(request, None)
        self._waiting.wake(request)

    def _release(self, slot: int, request: Request) -> None:
        self._running.release(slot, request)
        self._shortage -= self._running.admission.most_given_back(request)

    def _tell_evicted(self, before: int, why: str) -> None:
        count = self._blocks.stats.evicted_blocks - before
        if count:
            self._tell("evicted", None, blocks=count, why=why)

    def _tell(self, event: str, request: Request | None, **facts: object) -> None:
        if self._observer is not None:
            self._observer(event, None if request is None else request.label, facts)

    def check(self) -> None:
        """Assert every invariant of the scheduler and the cache. O(cache size); for tests and debugging."""
        leaving = [item for flight in self._flights for item in flight.leaving.items()]
        live = [*self._running.requests(), *self._waiting.requests()]
        live += [request for _, request in leaving if request.finish_reason is None]
        assert len(live) == len(set(live)), "a request is in two places"
        listed = [request for samples in self._requests.values() for request in samples]
        assert set(live) == set(listed) and len(listed) == self._num_live, "a request is nowhere"
        assert all(self._requests.values()), "a request without samples"
        assert set(self._deadlines) == {request for request in live if request.deadline is not None}, "wrong deadlines"
        self._waiting.check()
        self._running.check(leaving, self._waiting.urgency)
