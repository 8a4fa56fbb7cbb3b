"""A run to trace: the real scheduler on a virtual clock, and a book of what happened, kept beside the trace.

Steps take random times, and `depth` of them are under way at once. The fake runner draws random tokens.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from minivllm.batch import Batch, BatchResult
from minivllm.cache.block_manager import BlockManager
from minivllm.request import Request
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler
from minivllm.trace import StepRecord, TraceWriter

NUM_BLOCKS = 14
BLOCK_SIZE = 8
HOSTILE_IDS = [
    'a "quoted" \\ back\\slash', "two\nlines\r\n", "日本語 🦊 é", "\x1b[31mred\x1b[0m\x07\x00", "half \ud83e of a fox",
    "[bold]markup[/bold]", "queued", "], [", "‮right to left", "x" * 5000, "", "\u2028\x85",
]  # fmt: skip


@dataclass(slots=True)
class Run:
    """requests: in order of arrival. events: (time, name, label, facts). steps: as they were told to the writer.
    landed: label -> times at which a step with the last of its known tokens had come back."""

    requests: list[Request] = field(default_factory=list)
    events: list[tuple[float, str, str | None, dict[str, object]]] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    landed: dict[str, list[float]] = field(default_factory=dict)


class TracedWorld:
    """Feeds random requests to a scheduler whose observer is a `TraceWriter`."""

    def __init__(self, path: Path, seed: int, *, depth: int = 1) -> None:
        self.rng = random.Random(seed)
        self.now = self.rng.uniform(0, 1e5)
        self.start = self.now
        self.depth = depth
        self.run = Run()
        self.writer = TraceWriter(path, clock=lambda: self.now)
        self.blocks = BlockManager(NUM_BLOCKS, BLOCK_SIZE)
        self.scheduler = Scheduler(
            self.blocks, max_num_seqs=4, max_num_batched_tokens=24, max_model_len=90,
            clock=lambda: self.now, observer=self.observe,
        )  # fmt: skip
        self.out: deque[tuple[Batch, list[float], list[str]]] = deque()
        self.completing: list[str] = []  # requests whose last known tokens are in the batch that is being scheduled

    def observe(self, name: str, label: str | None, facts: Mapping[str, object]) -> None:
        self.run.events.append((self.now, name, label, dict(facts)))
        if name == "chunk" and label is not None and facts["stop"] == facts["of"]:
            self.completing.append(label)
        self.writer.event(name, label, facts)

    def add(self, name: str, num_samples: int = 1) -> None:
        rng = self.rng
        prompt = [1] * rng.choice([0, 8, 20]) + rng.choices(range(10, 13), k=rng.randrange(1, 30))
        leader: Request | None = None
        samples = []
        for index in range(num_samples):
            request = Request(
                request_id=name, prompt_token_ids=prompt, params=SamplingParams(), max_tokens=rng.randrange(1, 40),
                stop_ids=frozenset({7}), seed=0, index=index, leader=leader,
            )  # fmt: skip
            leader = leader or request
            samples.append(request)
        self.scheduler.add(samples)
        self.run.requests += samples

    def tick(self) -> float:
        self.now += self.rng.choice([0.0, 1e-7, self.rng.expovariate(1e4), self.rng.expovariate(1e2)])
        return self.now

    def step(self) -> None:
        self.now += 1e-6  # between two steps some time passes, which tells their events apart
        begin = self.tick()
        batch = self.scheduler.schedule()
        if batch is not None:
            self.out.append((batch, [begin, self.tick(), self.tick()], self.completing))
            self.completing = []
        if self.out and (batch is None or len(self.out) >= self.depth):
            self.land()

    def land(self) -> None:
        batch, times, completing = self.out.popleft()
        waited = self.tick()
        ids = [self.rng.choice([7, *range(100, 130)]) for _ in batch.samples]
        alive = {request.label for request in self.run.requests if request.finish_reason is None}
        self.scheduler.update(batch, BatchResult(ids))
        alive = {request.label for request in self.run.requests if request.finish_reason is None} & alive
        for label in completing:
            if label in alive:
                self.run.landed.setdefault(label, []).append(waited)
        decodes = batch.token_counts.count(0)
        record = StepRecord(
            *times, waited, self.tick(), decodes, len(batch.slots) - decodes, len(batch.token_ids),
            self.scheduler.num_running, self.scheduler.num_waiting,
            self.blocks.num_used, self.blocks.num_cached, self.blocks.num_free,
        )  # fmt: skip
        self.run.steps.append(record)
        self.writer.step(record)

    def play(self, names: list[str]) -> Run:
        """Serve a request for each name, some with several samples, with aborts and a cleared cache on the way."""
        waiting = list(names)
        while waiting or self.scheduler.has_unfinished:
            if waiting and self.rng.random() < 0.4:
                self.add(waiting.pop(0), self.rng.choice([1, 1, 1, 3]))
            if self.rng.random() < 0.01:
                self.scheduler.clear_cache()
            if self.rng.random() < 0.02:
                self.scheduler.abort(self.rng.choice(self.run.requests).request_id if self.run.requests else "")
            self.step()
        return self.run
