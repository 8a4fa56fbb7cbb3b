"""What the deciding tower costs: microseconds a decode step, and seconds for many simulated requests; no model runs.

    python bench/scheduler.py [--rows 256] [--requests 100000] [--check-every 500]

A step is `schedule` + `update` with every row decoding. The simulation draws random lengths, tokens, stops and aborts
over a small cache with two batches out, audits every invariant each --check-every steps (and at the end), and counts
that every request ended exactly once. The audits are part of its time.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter, deque
from dataclasses import dataclass

import click
from rich.console import Console
from rich.table import Table

from minivllm.batch import Batch
from minivllm.cache.block_manager import BlockManager
from minivllm.request import FinishReason, Request
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler

STOP_ID = 0
MAX_WAITING = 512


def make_request(name: str, prompt_len: int, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(name, [1] * prompt_len, params, max_tokens=max_tokens, stop_ids=frozenset({STOP_ID}), seed=0)


def time_decode_steps(rows: int, steps: int, block_size: int) -> tuple[list[float], list[float]]:
    """Microseconds of each `schedule` and each `update` of `rows` decoding requests, out of step with each other."""
    max_len = 64 + 2 * steps
    scheduler = Scheduler(
        BlockManager(rows * max_len // block_size, block_size),
        max_num_seqs=rows,
        max_num_batched_tokens=64 * rows,
        max_model_len=max_len,
    )
    for index in range(rows):
        scheduler.add(make_request(str(index), 1 + index % 64, max_tokens=steps + 10))
    tokens = [1] * rows
    schedules, updates = [], []
    for step in range(steps + 2):
        begin = time.perf_counter()
        batch = scheduler.schedule()
        middle = time.perf_counter()
        assert batch is not None
        assert len(batch.samples) == rows
        again = time.perf_counter()
        scheduler.update(batch, tokens)
        end = time.perf_counter()
        if step >= 2:  # the prompts, and a warm-up
            schedules.append((middle - begin) * 1e6)
            updates.append((end - again) * 1e6)
    return schedules, updates


@dataclass
class Simulated:
    """What a simulation did."""

    seconds: float
    check_seconds: float
    steps: int
    checks: int
    tokens: int
    ends: Counter[FinishReason]


def simulate(requests: int, rows: int, check_every: int, seed: int) -> Simulated:
    """Serve `requests` random requests to their end; asserts that each ended once and the cache is empty again."""
    rng = random.Random(seed)
    blocks = BlockManager(3000, 16)
    scheduler = Scheduler(blocks, max_num_seqs=rows, max_num_batched_tokens=2048, max_model_len=1024)
    pool = rng.choices(range(400), k=1 << 20)  # one token in 400 is the stop id
    lengths = iter([(rng.randint(1, 600), rng.randint(1, 120)) for _ in range(requests)])
    out: deque[Batch] = deque()
    done = Simulated(0.0, 0.0, 0, 0, 0, Counter())
    ended: set[str] = set()
    added = 0
    begin = time.perf_counter()
    while added < requests or scheduler.has_unfinished:
        while added < requests and scheduler.num_waiting < MAX_WAITING:
            prompt_len, max_tokens = next(lengths)
            scheduler.add(make_request(str(added), prompt_len, max_tokens))
            added += 1
        batch = scheduler.schedule()
        if batch is not None:
            out.append(batch)
            done.steps += 1
        if len(out) == 2 or batch is None:
            landed = out.popleft()
            count = len(landed.samples)
            offset = rng.randrange(len(pool) - rows)
            for name, token, reason in scheduler.update(landed, pool[offset : offset + count]):
                done.tokens += token is not None
                if reason is not None:
                    assert name not in ended
                    ended.add(name)
                    done.ends[reason] += 1
        if rng.random() < 0.01:
            victim = str(rng.randrange(max(0, added - MAX_WAITING - rows), added))
            if scheduler.abort(victim):
                assert victim not in ended
                ended.add(victim)
                done.ends[FinishReason.ABORT] += 1
        if done.steps % check_every == 0:
            start = time.perf_counter()
            scheduler.check()
            done.check_seconds += time.perf_counter() - start
            done.checks += 1
    scheduler.check()
    done.seconds = time.perf_counter() - begin
    assert len(ended) == requests
    assert blocks.num_free == 3000
    return done


@click.command()
@click.option("--rows", default=256, show_default=True, help="requests that decode at once")
@click.option("--steps", default=2000, show_default=True, help="decode steps to time")
@click.option("--block-size", default=16, show_default=True)
@click.option("--requests", default=100_000, show_default=True, help="requests to simulate; 0 leaves it out")
@click.option("--check-every", default=500, show_default=True, help="steps between audits of every invariant")
@click.option("--seed", default=0, show_default=True)
def main(rows: int, steps: int, block_size: int, requests: int, check_every: int, seed: int) -> None:
    """Time the scheduler and the cache's bookkeeping without a model."""
    table = Table(title=f"a step of {rows} decoding requests, {steps} steps, microseconds")
    for column in ("", "median", "99th percentile"):
        table.add_column(column, justify="right")
    schedules, updates = time_decode_steps(rows, steps, block_size)
    both = [first + second for first, second in zip(schedules, updates, strict=True)]
    for name, values in (("schedule", schedules), ("update", updates), ("both", both)):
        table.add_row(name, f"{statistics.median(values):.1f}", f"{sorted(values)[int(0.99 * len(values))]:.1f}")
    Console().print(table)
    if not requests:
        return
    done = simulate(requests, rows, check_every, seed)
    table = Table(title=f"{requests:,} simulated requests, seed {seed}")
    table.add_column("what")
    table.add_column("figure", justify="right")
    table.add_row("seconds in all", f"{done.seconds:.1f}")
    table.add_row(f"of which {done.checks} audits", f"{done.check_seconds:.1f}")
    table.add_row("steps", f"{done.steps:,}")
    table.add_row("tokens", f"{done.tokens:,}")
    table.add_row("ends", ", ".join(f"{reason.value} {count:,}" for reason, count in sorted(done.ends.items())))
    Console().print(table)


if __name__ == "__main__":
    main()
