"""A world for the scheduler to live in: a fake runner with real block tables, and the books of what callers were told.

The fake "model" draws a fixed token for each (request, position), so what a request must return is known beforehand,
however its work was cut, mixed, delayed or ended.
"""

from __future__ import annotations

import random
import zlib
from collections import deque

from minivllm.batch import Batch, SlotParams
from minivllm.cache.block_manager import BlockManager
from minivllm.request import FinishReason, Request
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler, StepOutput

STOP, LENGTH, ABORT, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT, FinishReason.ERROR
STOP_ID = 7


def drawn(key: int, index: int) -> int:
    """Token number `index` of request `key`: one in 30 is the stop id, one in 150 is no number."""
    value = zlib.crc32(f"{key}/{index}".encode()) % 150
    return -1 if value == 149 else STOP_ID if value % 30 == 0 else 100 + value


def expected(request: Request) -> tuple[list[int], FinishReason]:
    """What `request` must return if nobody aborts it."""
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        token = drawn(request.seed, len(tokens))
        if token < 0:
            return tokens, ERROR
        tokens.append(token)
        if token in request.stop_ids:
            return tokens, STOP
    return tokens, LENGTH


class FakeRunner:
    """Slot tables and a KV cache of (request, position, token) cells; knows a request only by the seed in its slot."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.requests: dict[int, Request] = {}  # seed -> request
        self.key: dict[int, int] = {}  # slot -> seed of its request
        self.table: dict[int, list[int]] = {}
        self.written: dict[int, int] = {}
        self.last: dict[int, int] = {}
        self.kv: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.flying: deque[Batch] = deque()

    def launch(self, batch: Batch) -> list[int]:
        """Apply the deltas, write and read the cache, draw; asserts that every row makes sense."""
        self._apply(batch)
        counts = batch.token_counts
        assert len(batch.slots) == len(batch.starts) == len(batch.lengths) == len(counts)
        assert len(set(batch.slots)) == len(batch.slots), "a slot has two rows"
        assert counts == sorted(counts, key=bool), "decode rows come first"
        assert sum(counts) == len(batch.token_ids)
        tokens, ids, samples = iter(batch.token_ids), [], []
        for row, slot in enumerate(batch.slots):
            start, length, prompt = batch.starts[row], batch.lengths[row], self._request(slot).prompt_token_ids
            queries = [next(tokens) for _ in range(counts[row])] or [self.last[slot]]
            assert length == len(queries)
            assert queries == prompt[start : start + length] or (start >= len(prompt) and counts[row] == 0)
            self._write(slot, start, queries)
            if self.written[slot] >= len(prompt):
                samples.append(row)
                ids.append(self._draw(slot))
        assert batch.samples == samples
        self.flying.append(batch)
        return ids

    def _request(self, slot: int) -> Request:
        return self.requests[self.key[slot]]

    def _apply(self, batch: Batch) -> None:
        flying = {slot for other in self.flying for slot in other.slots}
        for params in batch.new_slots:
            request, given = self.requests[params.seed], self.requests[params.seed].params
            assert params.slot not in flying, "a slot changes hands while a batch uses it"
            assert params == SlotParams(
                params.slot, given.temperature, given.top_k, given.top_p, given.min_p, request.seed
            )
            self.key[params.slot] = params.seed
            self.table[params.slot], self.written[params.slot] = [], 0
        alive = flying | {slot for slot in self.key if self._request(slot).finish_reason is None}
        for slot, index, block in zip(batch.block_slots, batch.block_indices, batch.block_ids, strict=True):
            assert slot in batch.slots, "a block for nobody in this batch"
            assert index == len(self.table[slot])
            assert all(block not in self.table[other] for other in alive | {slot}), "a block changes hands too early"
            self.table[slot].append(block)

    def _write(self, slot: int, start: int, queries: list[int]) -> None:
        assert start == self.written[slot], "a position is skipped or written twice"
        self.written[slot] += len(queries)
        assert len(self.table[slot]) == -(-self.written[slot] // self.block_size)
        for position, token in enumerate(queries, start):
            self.kv[self._cell(slot, position)] = (self.key[slot], position, token)
        for position in range(self.written[slot]):
            assert self.kv[self._cell(slot, position)][:2] == (self.key[slot], position), "a cell was overwritten"

    def _cell(self, slot: int, position: int) -> tuple[int, int]:
        return self.table[slot][position // self.block_size], position % self.block_size

    def _draw(self, slot: int) -> int:
        request = self._request(slot)
        index = self.written[slot] - len(request.prompt_token_ids)
        assert index < request.max_tokens, "computed past max_tokens"
        self.last[slot] = drawn(request.seed, index)
        return self.last[slot]


class World:
    """A scheduler, its fake runner and the books of what each caller was told."""

    def __init__(self, *, num_blocks=64, block_size=8, max_num_seqs=4, budget=64, max_model_len=64):
        self.blocks = BlockManager(num_blocks, block_size)
        self.time = 0.0
        self.limits = (max_num_seqs, budget, max_model_len)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            clock=lambda: self.time,
        )
        self.runner = FakeRunner(block_size)
        self.out: deque[tuple[Batch, list[int]]] = deque()
        self.told: dict[str, list[StepOutput]] = {}
        self.admitted: list[int] = []

    def make(self, length: int, max_tokens: int, *, stop: bool = False) -> Request:
        key = len(self.runner.requests)
        prompt = random.Random(key).choices(range(1000, 2000), k=length)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.5 + key, top_k=key, top_p=0.9, min_p=0.1)
        stop_ids = frozenset({STOP_ID} if stop else ())
        return Request(f"r{key}", prompt, params, max_tokens=max_tokens, stop_ids=stop_ids, seed=key)

    def add(self, length: int, max_tokens: int, *, stop: bool = False) -> Request:
        request = self.make(length, max_tokens, stop=stop)
        self.scheduler.add(request)
        self.runner.requests[request.seed] = request
        self.told[request.request_id] = []
        return request

    def schedule(self) -> Batch | None:
        due = {
            request.slot
            for request in self.runner.requests.values()
            if request.finish_reason is None
            and len(request.prompt_token_ids) <= request.num_scheduled < request.num_to_schedule
        }
        batch = self.scheduler.schedule()
        self.scheduler.check()
        if batch is None:
            assert not due
            return None
        assert batch.slots, "a batch of nothing"
        assert due == {s for s, count in zip(batch.slots, batch.token_counts, strict=True) if not count}, "starved"
        max_num_seqs, budget, _ = self.limits
        assert batch.num_tokens <= budget
        assert all(0 <= slot < max_num_seqs for slot in batch.slots)
        self.admitted += [params.seed for params in batch.new_slots]
        assert self.admitted == sorted(self.admitted), "not first come, first served"
        self.out.append((batch, self.runner.launch(batch)))
        return batch

    def update(self) -> list[StepOutput]:
        self.time += 1.0
        batch, ids = self.out.popleft()
        outputs = self.scheduler.update(batch, ids)
        assert self.runner.flying.popleft() is batch
        self.scheduler.check()
        for output in outputs:
            self.told[output.request_id].append(output)
        return outputs

    def abort(self, request: Request) -> bool:
        self.time += 1.0
        alive = request.finish_reason is None
        assert self.scheduler.abort(request.request_id) is alive
        self.scheduler.check()
        if alive:
            self.told[request.request_id].append(StepOutput(request.request_id, None, ABORT))
        return alive

    def drain(self) -> None:
        """Run until nothing is left; then every caller must have been told exactly what was due."""
        while self.scheduler.has_unfinished:
            scheduled = self.schedule()
            assert scheduled or self.out, "stuck"
            while self.out:
                self.update()
        assert self.schedule() is None
        assert self.blocks.num_free * self.blocks.block_size == self.blocks.num_tokens
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        for request in self.runner.requests.values():
            self._check_told(request)

    def _check_told(self, request: Request) -> None:
        told = self.told[request.request_id]
        reasons = [output.finish_reason for output in told]
        tokens = [output.token_id for output in told if output.token_id is not None]
        assert reasons[:-1] == [None] * (len(told) - 1), "something was told after the end"
        assert reasons[-1] is request.finish_reason is not None
        assert tokens == request.output_token_ids
        all_tokens, reason = expected(request)
        if reasons[-1] is ABORT:
            assert tokens == all_tokens[: len(tokens)]
        else:
            assert (tokens, reasons[-1]) == (all_tokens, reason)
        assert request.slot is None
        assert (request.first_token_time is None) == (not tokens)
        times = [request.arrival_time, request.first_token_time, request.finish_time]
        known = [time for time in times if time is not None]
        assert known == sorted(known)
