"""The engine's loop in virtual time: the real scheduler, pool and tree, with a fake runner that only takes time.

The clock stands still while Python works. It moves by what the cost model says a step takes, by the host time that the
settings charge, and to the next arrival where there is nothing to do.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from minivllm.batch import Batch, BatchResult
from minivllm.cache.block_manager import BlockManager
from minivllm.errors import QueueFullError, RequestError
from minivllm.request import FinishReason, Request, StepOutput
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler
from minivllm.trace import StepRecord, TraceWriter
from simulation.cost import StepLoad, load_of
from simulation.result import Result, Sample
from simulation.settings import Settings
from simulation.workload import ANSWER_TOKEN, Arrival, Workload

END_TOKEN = 0
ANSWERED = (FinishReason.LENGTH, FinishReason.STOP)


class FakeRunner:
    """Draws `ANSWER_TOKEN`, and `END_TOKEN` at the end of an answer where `ends` are wanted.

    It knows a request by its seed alone: the tokens it has when the last token of its answer is drawn.
    """

    def __init__(self, max_num_seqs: int, ends: bool) -> None:
        self._last = [0] * max_num_seqs  # slot -> seed of its request
        self._ends = ends

    def draw(self, batch: Batch) -> BatchResult:
        """The tokens of a batch."""
        if not self._ends:
            return BatchResult(token_ids=[ANSWER_TOKEN] * len(batch.samples))
        last, slots, starts, lengths = self._last, batch.slots, batch.starts, batch.lengths
        for new in batch.new_slots:
            last[new.slot] = new.seed
        ids = [END_TOKEN if starts[row] + lengths[row] >= last[slots[row]] else ANSWER_TOKEN for row in batch.samples]
        return BatchResult(token_ids=ids)


@dataclass(slots=True)
class _Flight:
    """A batch that is out. The host scheduled it from `begin` to `scheduled`; at `end` its results come."""

    batch: Batch
    drawn: BatchResult
    load: StepLoad
    begin: float
    scheduled: float
    end: float


class Simulation:
    """One run of one workload. check_every: steps between audits of every invariant; 0: only one, at the end.

    on_end: called with the number of requests that have ended, at each hundredth of them. record: a Chrome trace of the
    run, in virtual time, is written here.
    """

    def __init__(
        self,
        name: str,
        settings: Settings,
        workload: Workload,
        *,
        check_every: int = 0,
        on_end: Callable[[int], None] = lambda ended: None,
        record: Path | None = None,
    ) -> None:
        self._now = 0.0
        self.result = Result(name, settings, workload.total)
        self._settings = settings
        self._stream = workload.arrivals()
        self._check_every, self._on_end = check_every, on_end
        self._hundredths = 0  # of the requests, that have ended
        self._next = next(self._stream, None)
        self._later: list[tuple[float, int, Arrival]] = []  # heap of the chats' turns to come
        self._live: dict[str, tuple[Arrival, Request]] = {}
        self._admitted: dict[str, float] = {}  # live request -> when it first got a slot
        self._numbers = count()
        self._was_full = False  # concurrency has kept arrivals away until now
        self._trace = None if record is None else TraceWriter(record, clock=lambda: self._now)
        self._flights: deque[_Flight] = deque()
        self._device_free = 0.0  # when the last of them ends
        self._landed = 0
        self._blocks = BlockManager(settings.num_blocks, settings.block_size, prefix_caching=settings.prefix_caching)
        self._scheduler = Scheduler(
            self._blocks,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=settings.max_model_len,
            policy=settings.policy,
            prefix_aware=settings.prefix_aware,
            max_num_waiting=settings.max_num_waiting,
            clock=lambda: self._now,
            observer=self._observe,
        )
        foreseen = settings.max_tokens is None
        self._runner = FakeRunner(settings.max_num_seqs, ends=not foreseen)
        self._params = SamplingParams(temperature=0.0, ignore_eos=foreseen, timeout=settings.timeout_s)
        self._stop_ids = frozenset() if foreseen else frozenset({END_TOKEN})

    def run(self) -> Result:
        """Serve everything to its end. Asserts that each request ended once, and that all tokens add up."""
        begin = time.perf_counter()
        try:
            while self._step():
                self._report_progress()
        finally:
            if self._trace is not None:
                self._trace.close()
        self._finish()
        self.result.real_s = time.perf_counter() - begin
        return self.result

    def _step(self) -> bool:
        """What the engine does in a step, launch and wait being all that takes time; False where nothing is left."""
        self._take_arrivals()
        batch = self._schedule()
        if batch is not None:
            self._launch(batch)
        if self._flights and (batch is None or len(self._flights) == self._settings.depth):
            self._land()
        elif batch is None:
            assert not self._scheduler.has_unfinished, "nothing runs, and the scheduler starts nothing"
            if math.isinf(self._next_time()):
                return False
            self._now = self._next_time()
        return True

    def _schedule(self) -> Batch | None:
        begin = time.perf_counter()
        expired = self._scheduler.expire() if self._settings.timeout_s is not None else []
        batch = self._scheduler.schedule()
        self.result.scheduler_s += time.perf_counter() - begin
        for output in expired:
            self._end(output)
        return batch

    def _launch(self, batch: Batch) -> None:
        """Let the device compute `batch` as soon as it has computed what was launched before."""
        begin = self._now
        self._now += self._settings.scheduler_us * 1e-6
        load = load_of(batch)
        seconds = self._settings.cost.seconds(load)
        self._device_free = max(self._now, self._device_free) + seconds
        drawn = self._runner.draw(batch)
        self._flights.append(_Flight(batch, drawn, load, begin, self._now, self._device_free))
        result, used, total = self.result, self._blocks.num_used, self._settings.num_blocks
        running, waiting = self._scheduler.num_running, self._scheduler.num_waiting
        if result.timeline.wants(result.steps):
            cached = self._blocks.num_cached / total
            result.timeline.add(Sample(self._now, running, waiting, used / total, cached))
        result.steps += 1
        result.rows += len(batch.slots)
        result.computed_tokens += load.rows + load.tokens
        result.busy_s += seconds
        result.running += running * seconds
        result.used_blocks += used * seconds
        result.most_used_blocks = max(result.most_used_blocks, used)

    def _land(self) -> None:
        """Wait for the oldest batch that is out, and tell the scheduler."""
        flight = self._flights.popleft()
        self._now = max(self._now, flight.end)
        begin = time.perf_counter()
        outputs = self._scheduler.update(flight.batch, flight.drawn)
        self.result.scheduler_s += time.perf_counter() - begin
        for output in outputs:
            if output.finish_reason is not None:
                self._end(output)
        if self._trace is not None:
            self._record(self._trace, flight)
        self._landed += 1
        if self._check_every and self._landed % self._check_every == 0:
            self._check()

    def _end(self, output: StepOutput) -> None:
        """Keep the figures of a request that has ended, and nothing else of it but the next turn of its chat."""
        arrival, request = self._live.pop(output.request_id)
        admitted = self._admitted.pop(output.request_id, None)
        result, answer = self.result, request.output_token_ids
        assert request.finish_reason is not None, "an ended request says why"
        result.ends[request.finish_reason.value] += 1
        result.answer_tokens += len(answer)
        result.preemptions += request.num_preemptions
        if request.finish_reason not in ANSWERED:
            result.unsent += len(arrival.later or ())
            return
        assert admitted is not None, "a request without a slot has got an answer"
        assert len(answer) == min(arrival.answer, request.max_tokens), "an answer is too short or too long"
        result.record(request, admitted)
        turn = arrival.next_turn(self._now, answer)
        if turn is not None:
            heapq.heappush(self._later, (turn.time, next(self._numbers), turn))

    def _next_time(self) -> float:
        """When the next request arrives; infinite where none will."""
        first = math.inf if self._next is None else self._next.time / self._settings.speed_up
        return min(first, self._later[0][0]) if self._later else first

    def _take_arrivals(self) -> None:
        """Add what has arrived by now, each at its time, or now where only an end has made room for it."""
        limit = self._settings.concurrency or math.inf
        while len(self._live) < limit and (when := self._next_time()) <= self._now:
            if self._later and self._later[0][0] == when:
                arrival = heapq.heappop(self._later)[-1]
            else:
                assert self._next is not None, "the next arrival is the stream's"
                arrival, self._next = self._next, next(self._stream, None)
            self._add(arrival, self._now if self._was_full else when)
        self._was_full = len(self._live) >= limit

    def _add(self, arrival: Arrival, when: float) -> None:
        """Hand the scheduler a request that came at `when`, the clock being set back to it."""
        prompt = arrival.prompt_token_ids()
        request = Request(
            request_id=str(next(self._numbers)),
            prompt_token_ids=prompt,
            params=self._params,
            max_tokens=self._settings.max_tokens or arrival.answer,
            stop_ids=self._stop_ids,
            seed=len(prompt) + arrival.answer - 1,
            priority=arrival.priority,
        )
        now, self._now = self._now, when
        try:
            self._scheduler.add([request])
            self._live[request.request_id] = (arrival, request)
            return
        except QueueFullError:
            self.result.refused += 1
        except RequestError:
            self.result.impossible += 1
        finally:
            self._now = now
        self.result.unsent += len(arrival.later or ())

    def _observe(self, event: str, label: str | None, facts: Mapping[str, object]) -> None:
        if event == "admitted" and label is not None:
            self._admitted.setdefault(label, self._now)
        if self._trace is not None:
            self._trace.event(event, label, facts)

    def _record(self, trace: TraceWriter, flight: _Flight) -> None:
        load, blocks = flight.load, self._blocks
        record = StepRecord(
            begin=flight.begin,
            scheduled=flight.scheduled,
            launched=flight.scheduled,
            waited=self._now,
            end=self._now,
            decode_rows=load.rows,
            prefill_rows=len(flight.batch.slots) - load.rows,
            prefill_tokens=load.tokens,
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            used_blocks=blocks.num_used,
            cached_blocks=blocks.num_cached,
            free_blocks=blocks.num_free,
        )
        trace.step(record)

    def _report_progress(self) -> None:
        ended = self.result.ended
        hundredths = 100 * ended // self.result.total
        if hundredths == self._hundredths:
            return
        if hundredths // 10 > self._hundredths // 10:
            self.result.record_rss()
        self._hundredths = hundredths
        self._on_end(ended)

    def _check(self) -> None:
        begin = time.perf_counter()
        self._scheduler.check()
        self.result.check_s += time.perf_counter() - begin
        self.result.checks += 1

    def _finish(self) -> None:
        """The audit at the end, and the figures that the cache has counted."""
        self._report_progress()
        self._check()
        result, stats = self.result, self._blocks.stats
        assert not self._live and not self._admitted, "a request was forgotten"
        assert result.ended == result.total, f"{result.ended} of {result.total} requests have ended"
        assert self._blocks.num_used == 0, "blocks are lost"
        result.prompt_tokens, result.cached_tokens = stats.prompt_tokens, stats.cached_tokens
        result.evicted_blocks = stats.evicted_blocks
        result.makespan_s = self._now
