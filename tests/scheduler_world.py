"""A world for the scheduler to live in: a fake runner with a real block cache, and the books of what callers were told.

The fake "model" draws a fixed token for each (request, position), so what a request must return is known beforehand,
however its work was cut, mixed, delayed, shared, preempted or ended. A cell of the fake cache holds a digest of the
whole sequence up to its token: whoever reads a cell that somebody else wrote finds out whether it is his own.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from dataclasses import replace
from typing import Any

from minivllm.batch import Batch, BatchResult, SlotParams
from minivllm.cache.block_manager import BlockManager
from minivllm.request import FinishReason, Request, StepOutput
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler

STOP, LENGTH, ABORT = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT
TIMEOUT, ERROR = FinishReason.TIMEOUT, FinishReason.ERROR
STOP_ID = 7


def drawn(key: int, index: int) -> int:
    """Token number `index` of request `key`: one in 30 is the stop id, one in 150 is no number."""
    value = zlib.crc32(f"{key}/{index}".encode()) % 150
    return -1 if value == 149 else STOP_ID if value % 30 == 0 else 100 + value


def expected(request: Request) -> tuple[list[int], FinishReason]:
    """What `request` must return if nobody ends it."""
    tokens: list[int] = []
    while len(tokens) < request.max_tokens:
        token = drawn(request.seed, len(tokens))
        if token < 0:
            return tokens, ERROR
        tokens.append(token)
        if token in request.stop_ids:
            return tokens, STOP
    return tokens, LENGTH


def expect_short_answers(scheduler: Scheduler) -> None:
    """Let admission believe that answers have one token, so that it lets in more than fits."""
    for _ in range(600):
        scheduler._running.admission._lengths.record(1)


class Life:
    """What the fake runner knows of a request: its whole sequence beforehand, and a digest of each beginning."""

    def __init__(self, request: Request) -> None:
        self.request = request
        answer = [drawn(request.seed, index) for index in range(request.max_tokens)]
        self.tokens = request.prompt_token_ids + answer
        self.digests: list[int] = []
        digest = hash(request.cache_salt)
        for token in self.tokens:
            digest = hash((digest, token))
            self.digests.append(digest)


class FakeRunner:
    """Slot tables and a KV cache of digests; knows a request only by the seed in its slot."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.lives: dict[int, Life] = {}  # seed -> request
        self.at: dict[int, Life] = {}  # slot -> request
        self.table: dict[int, list[int]] = {}
        self.kv: dict[int, list[int | None]] = {}  # block -> digests
        self.flying: deque[Batch] = deque()
        self.num_copies = 0
        self.num_computed = 0

    def launch(self, batch: Batch) -> list[int]:
        """Apply the deltas, write and read the cache, draw; asserts that every row makes sense."""
        counts = batch.token_counts
        assert len(batch.slots) == len(batch.starts) == len(batch.lengths) == len(counts)
        assert len(set(batch.slots)) == len(batch.slots), "a slot has two rows"
        assert counts == sorted(counts, key=bool), "decode rows come first"
        assert sum(counts) == len(batch.token_ids)
        self._apply(batch)
        tokens, ids, samples = iter(batch.token_ids), [], []
        for row, slot in enumerate(batch.slots):
            life, start, length = self.at[slot], batch.starts[row], batch.lengths[row]
            given = [next(tokens) for _ in range(counts[row])]
            assert length == (counts[row] or 1)
            assert not given or given == life.tokens[start : start + length], "wrong tokens to compute"
            self._compute(slot, start, start + length)
            if not given or start + length == life.request.num_known:
                samples.append(row)
                ids.append(self._draw(life, start + length))
        assert batch.samples == samples
        self.num_computed += batch.num_tokens
        self.flying.append(batch)
        return ids

    def _apply(self, batch: Batch) -> None:
        flying = {slot for other in self.flying for slot in other.slots}
        for params in batch.new_slots:
            life, given = self.lives[params.seed], self.lives[params.seed].request.params
            assert params.slot not in flying, "a slot changes hands while a batch uses it"
            assert params.slot in batch.slots, "a slot without a row"
            sampling = (given.temperature, given.top_k, given.top_p, given.min_p, life.request.seed)
            assert params == SlotParams(params.slot, *sampling)
            self.at[params.slot], self.table[params.slot] = life, []
        for slot, index, block in zip(batch.block_slots, batch.block_indices, batch.block_ids, strict=True):
            table = self.table[slot]
            assert index <= len(table), "a hole in a block table"
            table[index:] = [block, *table[index + 1 :]]
        read = [list(self.kv[block]) for block in batch.copy_sources]
        for target, cells in zip(batch.copy_targets, read, strict=True):
            self.kv[target] = cells
            self.num_copies += 1

    def _compute(self, slot: int, start: int, stop: int) -> None:
        life, table = self.at[slot], self.table[slot]
        assert len(table) == -(-stop // self.block_size), "too few blocks, or too many"
        for position in range(start, stop):
            block, offset = divmod(position, self.block_size)
            others = [other for other in self.at if other != slot and self._alive(other)]
            assert all(table[block] not in self.table[other] for other in others), "a shared block is written"
            self.kv.setdefault(table[block], [None] * self.block_size)[offset] = life.digests[position]
        for index, block in enumerate(table):
            begin = index * self.block_size
            right = life.digests[begin : min(begin + self.block_size, stop)]
            assert self.kv[block][: len(right)] == right, "a request reads what is not its own"

    def _alive(self, slot: int) -> bool:
        return self.at[slot].request.slot == slot

    def _draw(self, life: Life, length: int) -> int:
        index = length - len(life.request.prompt_token_ids)
        assert index < life.request.max_tokens, "computed past max_tokens"
        return drawn(life.request.seed, index)


class World:
    """A scheduler, its fake runner and the books of what each caller was told."""

    def __init__(
        self,
        *,
        num_blocks=64,
        block_size=8,
        max_num_seqs=4,
        budget=64,
        max_model_len=64,
        prefix_caching=True,
        **options,
    ):
        self.blocks = BlockManager(num_blocks, block_size, prefix_caching=prefix_caching)
        self.time = 0.0
        self.limits = (max_num_seqs, budget, max_model_len)
        self.in_order = options.get("policy", "fcfs") == "fcfs" and not options.get("prefix_aware", True)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            clock=lambda: self.time,
            observer=self._observe,
            **options,
        )
        self.runner = FakeRunner(block_size)
        self.out: deque[tuple[Batch, list[int]]] = deque()
        self.told: dict[tuple[str, int], list[StepOutput]] = {}
        self.events: list[tuple[str, str | None, dict[str, object]]] = []
        self.num_operations = 0
        self.num_requests = 0

    @property
    def requests(self) -> list[Request]:
        return [life.request for life in self.runner.lives.values()]

    def make(
        self, length: int, max_tokens: int, *, stop: bool = False, prompt: list[int] | None = None, **options: Any
    ) -> Request:
        """A request of its own tokens, or of `prompt`. Options: of Request, or of SamplingParams."""
        key = len(self.runner.lives)
        prompt = random.Random(key).choices(range(1000, 2000), k=length) if prompt is None else prompt
        own = {name: options.pop(name) for name in ("priority", "cache_salt", "pooling") if name in options}
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.5 + key, top_k=key, top_p=0.9, min_p=0.1, **options
        )
        return Request(
            request_id=f"r{self.num_requests}",
            prompt_token_ids=prompt,
            params=params,
            max_tokens=max_tokens,
            stop_ids=frozenset({STOP_ID} if stop else ()),
            seed=key,
            **own,
        )

    def add(self, length: int, max_tokens: int, **options: Any) -> Request:
        """Add a request; with n > 1 its other samples too. Returns the leader."""
        return self.add_made(self.make(length, max_tokens, **options))

    def add_made(self, leader: Request) -> Request:
        self.num_operations += 1
        samples = [leader]
        for index in range(1, leader.params.num_samples):
            samples.append(
                replace(leader, index=index, leader=leader, seed=leader.seed + index, output_token_ids=[], logprobs=[])
            )
            samples[-1].params = replace(leader.params, temperature=0.5 + leader.seed + index)
        self.scheduler.add(samples)
        self.scheduler.check()
        self.num_requests += 1
        for request in samples:
            self.runner.lives[request.seed] = Life(request)
            self.told[request.request_id, request.index] = []
        return leader

    def schedule(self) -> Batch | None:
        self.num_operations += 1
        for output in self.scheduler.expire():
            assert output.finish_reason is TIMEOUT
            self.told[output.request_id, output.sample].append(output)
        due = {
            request.slot: request.num_preemptions
            for request in self.requests
            if request.finish_reason is None
            and request.slot is not None
            and request.num_known <= request.num_scheduled < request.num_to_schedule
        }
        before = {request.slot: request for request in self.requests if request.slot in due}
        batch = self.scheduler.schedule()
        self.scheduler.check()
        due = {slot: before[slot] for slot, count in due.items() if before[slot].num_preemptions == count}
        if batch is None:
            assert not due or self.out, "decoding requests are starved"
            return None
        assert batch.slots, "a batch of nothing"
        assert set(due) == {s for s, count in zip(batch.slots, batch.token_counts, strict=True) if not count}, "starved"
        max_num_seqs, budget, _ = self.limits
        assert batch.num_tokens <= budget
        assert all(0 <= slot < max_num_seqs for slot in batch.slots)
        self.out.append((batch, self.runner.launch(batch)))
        return batch

    def update(self) -> list[StepOutput]:
        self.num_operations += 1
        self.time += 1.0
        batch, ids = self.out.popleft()
        outputs = self.scheduler.update(batch, BatchResult(ids))
        assert self.runner.flying.popleft() is batch
        self.scheduler.check()
        for output in outputs:
            self.told[output.request_id, output.sample].append(output)
        return outputs

    def abort(self, request: Request) -> bool:
        self.num_operations += 1
        self.time += 1.0
        group = [other for other in self.requests if other.request_id == request.request_id]
        alive = [other for other in group if other.finish_reason is None]
        assert self.scheduler.abort(request.request_id) is bool(alive)
        self.scheduler.check()
        for other in alive:
            self.told[other.request_id, other.index].append(StepOutput(other.request_id, other.index, None, ABORT))
        return bool(alive)

    def finish(self, request: Request) -> None:
        self.num_operations += 1
        self.scheduler.finish(request, ABORT)
        self.scheduler.check()
        self.told[request.request_id, request.index].append(StepOutput(request.request_id, request.index, None, ABORT))

    def clear_cache(self) -> None:
        self.num_operations += 1
        self.scheduler.clear_cache()
        self.scheduler.check()

    def drain(self) -> None:
        """Run until nothing is left; then every caller must have been told exactly what was due."""
        most = 100 + 20 * sum(request.num_to_schedule for request in self.requests)
        while self.scheduler.has_unfinished:
            scheduled = self.schedule()
            assert scheduled or self.out or not self.scheduler.has_unfinished, "stuck"
            while self.out:
                self.update()
            most -= 1
            assert most, "no progress: requests preempt each other for ever"
        assert self.schedule() is None
        assert self.blocks.num_used == 0
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)
        for request in self.requests:
            self._check_told(request)
        if self.in_order:
            admitted = [label for name, label, facts in self.events if name == "admitted" and not facts["again"]]
            leaders = [label for label in admitted if label and "/" not in label]
            assert leaders == sorted(leaders, key=lambda label: int(label[1:])), "not first come, first served"

    def _observe(self, name: str, label: str | None, facts: dict[str, object]) -> None:
        self.events.append((name, label, dict(facts)))

    def _check_told(self, request: Request) -> None:
        told = self.told[request.request_id, request.index]
        reasons = [output.finish_reason for output in told]
        tokens = [output.token_id for output in told if output.token_id is not None]
        assert reasons[:-1] == [None] * (len(told) - 1), "something was told after the end"
        assert reasons[-1] is request.finish_reason is not None
        assert tokens == request.output_token_ids
        all_tokens, reason = expected(request)
        if reasons[-1] in (ABORT, TIMEOUT):
            assert tokens == all_tokens[: len(tokens)]
        else:
            assert (tokens, reasons[-1]) == (all_tokens, reason)
        assert request.slot is None
        assert 0 <= request.num_cached_tokens < len(request.prompt_token_ids)
        assert (request.first_token_time is None) == (not tokens)
        times = [request.arrival_time, request.first_token_time, request.finish_time]
        known = [time for time in times if time is not None]
        assert known == sorted(known)


def calm(world: World, length: int, max_tokens: int, **options: Any) -> Request:
    """A request that no odd token ends before max_tokens."""
    prompt = options.pop("prompt", None) or [1000 + world.num_requests] * length
    request = world.make(length, max_tokens, prompt=list(prompt), **options)
    keys = range(100_000 * world.num_requests, 100_000 * (world.num_requests + 1), 10)
    request.seed = next(key for key in keys if -1 not in [drawn(key, index) for index in range(max_tokens)])
    return world.add_made(request)
