"""What the deciding tower costs, in microseconds: a decode step, finding a cached prompt, evicting a block, letting a
request in. No model runs.

    python bench/scheduler.py [--rows 256] [--nodes 100000] [--json FILE]

A step is `schedule` + `update` with every row decoding and prefix caching on. A prompt is found by `token_key` and
`BlockManager.match`, alone in the tree and in one of --nodes nodes, in which it is cut into many edges. Blocks are
evicted by growing a table while nothing is free. What runs whole workloads is bench/simulate.py.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from minivllm.batch import BatchResult
from minivllm.cache.block_manager import BlockManager
from minivllm.cache.radix_tree import token_key
from minivllm.request import Request
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler

STOP_ID = 0
VOCABULARY = 150_000
PROMPT_TOKENS = 8192
LONG_EDGE_TOKENS = 131_072
TAIL_BLOCKS = 2


@dataclass(frozen=True)
class Cost:
    """Microseconds of one operation over `calls` calls, and what it should cost at most."""

    name: str
    median: float
    p99: float
    calls: int
    target: float | None


def cost(name: str, microseconds: list[float], target: float | None = None) -> Cost:
    p99 = sorted(microseconds)[int(0.99 * len(microseconds))]
    return Cost(name, statistics.median(microseconds), p99, len(microseconds), target)


def timed(function: Callable[[int], object], calls: int) -> list[float]:
    """Microseconds of function(0), function(1), ..."""
    clock, spent = time.perf_counter_ns, []
    for call in range(calls):
        begin = clock()
        function(call)
        spent.append((clock() - begin) / 1e3)
    return spent


def some_tokens(rng: random.Random, length: int) -> list[int]:
    return rng.choices(range(1, VOCABULARY), k=length)


def make_request(name: str, prompt: list[int], max_tokens: int) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens),
        max_tokens=max_tokens,
        stop_ids=frozenset({STOP_ID}),
        seed=0,
    )


def decoding(rows: int, room: int, likely: int, block_size: int, rng: random.Random) -> Scheduler:
    """A scheduler in which `rows` requests decode, out of step with each other. Each may for `room` tokens; the cache
    holds `likely` of each, and past answers were no longer than that."""
    num_blocks = rows * -(-(64 + likely) // block_size)
    scheduler = Scheduler(
        BlockManager(num_blocks, block_size),
        max_num_seqs=rows,
        max_num_batched_tokens=65 * rows,
        max_model_len=64 + room,
    )
    for _ in range(512):
        scheduler._running.admission._lengths.record(rng.randint(1, likely))
    for index in range(rows):
        scheduler.add([make_request(str(index), some_tokens(rng, 1 + index % 64), room)])
    batch = scheduler.schedule()
    assert batch is not None
    assert len(batch.samples) == rows
    scheduler.update(batch, BatchResult([1] * rows))
    return scheduler


def measure_steps(rows: int, steps: int, block_size: int, rng: random.Random) -> Iterator[Cost]:
    room = steps + 20
    scheduler = decoding(rows, room, room, block_size, rng)
    clock, schedules, updates = time.perf_counter_ns, [], []
    for _ in range(steps):
        begin = clock()
        batch = scheduler.schedule()
        middle = clock()
        assert batch is not None
        result = BatchResult([1] * rows)
        again = clock()
        outputs = scheduler.update(batch, result)
        end = clock()
        assert len(outputs) == rows
        schedules.append((middle - begin) / 1e3)
        updates.append((end - again) / 1e3)
    yield cost(f"schedule, {rows} rows decoding", schedules)
    yield cost(f"update, {rows} rows decoding", updates)
    both = [first + second for first, second in zip(schedules, updates, strict=True)]
    yield cost(f"schedule + update, {rows} rows decoding", both, 150)


def measure_admission(rows: int, block_size: int, rng: random.Random) -> Iterator[Cost]:
    """The forecast itself: what everybody was promised would not fit."""
    scheduler = decoding(rows, 1024, 128, block_size, rng)
    running, blocks = scheduler._running, scheduler._blocks
    request = make_request("new", some_tokens(rng, 64), 1024)
    request.key, request.num_known, request.num_to_schedule = token_key(request.prompt_token_ids), 64, 1087
    prefix = blocks.match(request.key, None, 63)

    def first_of_a_step(_: int) -> int:
        running.admission.begin_step()
        return running.admission.shortage(request, prefix, running.decoding, running.prefilling)

    yield cost(f"admission forecast, {rows} running", timed(first_of_a_step, 500))


class Cache:
    """A block manager that is filled as requests would fill it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.manager = BlockManager(num_blocks, block_size)
        self._owners = count()

    def open(self, tokens: list[int]) -> int:
        owner = next(self._owners)
        self.manager.open(owner, self.manager.match(token_key(tokens), None, len(tokens)), None)
        return owner

    def add(self, tokens: list[int]) -> None:
        """Cache `tokens`."""
        owner = self.open(tokens)
        self.manager.grow(owner, len(tokens))
        self.manager.commit(owner, token_key(tokens), len(tokens))
        self.manager.release(owner)


def measure_match(cache: Cache, prompts: list[list[int]], where: str) -> Iterator[Cost]:
    """Finding and sharing cached prompts of PROMPT_TOKENS tokens; the last token is left to compute, as always."""
    manager, keys, calls, most = cache.manager, [token_key(prompt) for prompt in prompts], 500, PROMPT_TOKENS - 1
    assert all(manager.match(key, None, most).num_tokens == most for key in keys)

    def find(call: int) -> None:
        manager.match(token_key(prompts[call % len(prompts)]), None, most)

    def open_and_release(call: int) -> None:
        manager.open(-1, prefixes[call % len(keys)], None)
        manager.release(-1)

    yield cost(f"token_key + match of {PROMPT_TOKENS} tokens, {where}", timed(find, calls), 300)
    alone = timed(lambda call: manager.match(keys[call % len(keys)], None, most), calls)
    yield cost(f"match without token_key, {where}", alone)
    # Whole blocks only: what is left of the last one would be copied, which takes a block.
    prefixes = [manager.match(key, None, PROMPT_TOKENS) for key in keys]
    yield cost(f"open + release of it, {where}", timed(open_and_release, calls))


def branched(cache: Cache, prompts: list[list[int]], every: int, rng: random.Random) -> None:
    """Cache the prompts, and tails that leave each of them after every `every` blocks: so many edges it is cut into."""
    size = cache.manager.block_size
    for prompt in prompts:
        cache.add(prompt)
        for blocks in range(every, len(prompt) // size, every):
            cache.add(prompt[: blocks * size] + some_tokens(rng, size))


def filled(cache: Cache, nodes: int, rng: random.Random) -> list[list[int]]:
    """Add short texts, a hundred to a common beginning, until the tree has `nodes` nodes; returns some of the texts."""
    size, tree = cache.manager.block_size, cache.manager._tree
    texts, left = [], nodes - sum(1 for _ in tree._nodes())
    while left > 0:
        stem = some_tokens(rng, size)
        tails = min(left, 100)
        for _ in range(tails):
            texts.append(stem + some_tokens(rng, TAIL_BLOCKS * size))
            cache.add(texts[-1])
        left -= tails + 1
    return rng.sample(texts, min(1000, len(texts)))


def measure_tree(nodes: int, block_size: int, rng: random.Random) -> Iterator[Cost]:
    """Everything in one large tree; evicting comes last, as it takes the tree down."""
    prompts = [some_tokens(rng, PROMPT_TOKENS) for _ in range(8)]
    cache = Cache(nodes * (TAIL_BLOCKS + 1) + 10 * len(prompts) * PROMPT_TOKENS // block_size, block_size)
    branched(cache, prompts, 32, rng)
    texts = filled(cache, nodes, rng)
    manager, tree = cache.manager, cache.manager._tree
    number = sum(1 for _ in tree._nodes())
    where = f"{number:,} nodes"
    yield from measure_match(cache, prompts, f"{where}, {PROMPT_TOKENS // block_size // 32} edges")

    matches = [tree.match(token_key(text), None) for text in texts]
    pins = [len(match.blocks) for match in matches]

    def pin_and_unpin(call: int) -> None:
        place = call % len(matches)
        tree.unpin(tree.pin(matches[place].node, pins[place], None))

    yield cost(f"pin + unpin, {where}", timed(pin_and_unpin, 5000))
    yield cost(f"evicting a block, {where}", evictions(cache, 10_000), 5)
    manager.check([])


def evictions(cache: Cache, calls: int) -> list[float]:
    """Microseconds of growing a table by one block while nothing is free."""
    manager, size = cache.manager, cache.manager.block_size
    owner = cache.open([])
    begin = manager.num_free
    manager.grow(owner, begin * size)
    assert manager.num_free == 0
    before = manager.stats.evicted_blocks
    spent = timed(lambda call: manager.grow(owner, (begin + call + 1) * size), calls)
    assert manager.stats.evicted_blocks - before == calls
    manager.release(owner)
    return spent


def measure_edges(block_size: int, rng: random.Random) -> Iterator[Cost]:
    """The extremes: a prompt alone in the tree, one that is cut after every block, and the end of a very long edge."""
    prompts = [some_tokens(rng, PROMPT_TOKENS)]
    for every, where in (
        (PROMPT_TOKENS, "one edge"),
        (1, f"cut into {PROMPT_TOKENS // block_size} edges"),
    ):
        cache = Cache(4 * PROMPT_TOKENS // block_size, block_size)
        branched(cache, prompts, every, rng)
        yield from measure_match(cache, prompts, where)
    cache = Cache(LONG_EDGE_TOKENS // block_size, block_size)
    cache.add(some_tokens(rng, LONG_EDGE_TOKENS))
    calls = min(1000, cache.manager.num_cached)
    yield cost(f"evicting a block off an edge of {LONG_EDGE_TOKENS:,} tokens", evictions(cache, calls))


def show(costs: list[Cost], title: str) -> None:
    table = Table(title=title)
    table.add_column("microseconds of")
    for column in ("median", "99th percentile", "target"):
        table.add_column(column, justify="right")
    for one in costs:
        target = "" if one.target is None else f"{one.target:g}"
        style = None if one.target is None else "green" if one.median <= one.target else "red"
        table.add_row(one.name, f"{one.median:.1f}", f"{one.p99:.1f}", target, style=style)
    Console().print(table)


@click.command()
@click.option("--rows", default=256, show_default=True, help="Requests that decode at once.")
@click.option("--steps", default=2000, show_default=True, help="Decode steps to time.")
@click.option("--nodes", default=100_000, show_default=True, help="Nodes of the large tree.")
@click.option("--block-size", default=16, show_default=True, help="Tokens of a block.")
@click.option("--seed", default=0, show_default=True, help="Of the random tokens.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures there too.")
def main(rows: int, steps: int, nodes: int, block_size: int, seed: int, file: Path | None) -> None:
    """Time the scheduler and the cache's bookkeeping without a model."""
    rng = random.Random(seed)
    costs = [
        *measure_steps(rows, steps, block_size, rng),
        *measure_admission(rows, block_size, rng),
        *measure_edges(block_size, rng),
        *measure_tree(nodes, block_size, rng),
    ]
    show(costs, f"the deciding tower, blocks of {block_size} tokens")
    if file is not None:
        settings = {"rows": rows, "steps": steps, "nodes": nodes, "block_size": block_size, "seed": seed}
        file.write_text(json.dumps({**settings, "microseconds": [asdict(one) for one in costs]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
