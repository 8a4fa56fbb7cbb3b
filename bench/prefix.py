"""Hit rate of the prefix cache on a real load of shared prefixes, beside what an ideal cache would reach.

    python bench/prefix.py                             # $MINIVLLM_DATA/workloads/fairytaleqa_shared_prefix.jsonl.gz
    python bench/prefix.py --blocks 4000 --shuffle     # a cache that is too small, questions in random order

Every question about a fairy tale is one request: the tale, then the question. The real scheduler, block pool and radix
tree run, a fake runner draws. The ideal cache holds everything and shares at every token, not only at block borders:
request after request, the longest beginning that any earlier prompt has, but for the last token.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from bisect import bisect_left, insort
from collections import deque
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

from minivllm.batch import Batch, BatchResult
from minivllm.cache.block_manager import BlockManager
from minivllm.hub import BUNDLED_MODEL
from minivllm.request import Request
from minivllm.sampling_params import SamplingParams
from minivllm.scheduler import Scheduler
from minivllm.text import Tokenizer

DATA = Path(os.environ.get("MINIVLLM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


class Hits(NamedTuple):
    """Tokens of all prompts, those found in the cache, those an ideal cache would have had, and computed ones."""

    prompt_tokens: int
    cached_tokens: int
    ideal_tokens: int
    evicted_blocks: int
    steps: int


def read_prompts(file: Path) -> list[list[int]]:
    """One prompt a question: the context and the question, in the order of the file."""
    tokenizer = Tokenizer.from_pretrained(BUNDLED_MODEL)
    prompts = []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            context = tokenizer.encode(row["context"] + "\n\n")
            questions = [pair["question"] for pair in row["qa"]]
            prompts += [context + tokenizer.encode(f"Question: {question}\nAnswer:") for question in questions]
    return prompts


def ideal_hits(prompts: list[list[int]]) -> int:
    """Tokens of all prompts that an earlier one begins with, too; the longest such beginning is that of a neighbour in
    the sorted list of the earlier ones."""
    earlier: list[list[int]] = []
    hits = 0
    for prompt in prompts:
        place = bisect_left(earlier, prompt)
        shared = [common(prompt, other) for other in earlier[max(0, place - 1) : place + 1]]
        hits += min(max(shared, default=0), len(prompt) - 1)
        insort(earlier, prompt)
    return hits


def common(first: list[int], second: list[int]) -> int:
    """Length of the common beginning."""
    most = min(len(first), len(second))
    return next((index for index in range(most) if first[index] != second[index]), most)


def measure(
    prompts: list[list[int]], *, num_blocks: int, block_size: int, rows: int, budget: int, max_tokens: int, aware: bool
) -> Hits:
    """Run all prompts, queued at once, with one step in flight."""
    blocks = BlockManager(num_blocks, block_size)
    scheduler = Scheduler(
        blocks,
        max_num_seqs=rows,
        max_num_batched_tokens=budget,
        max_model_len=max(map(len, prompts)) + max_tokens,
        prefix_aware=aware,
    )
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        request = Request(
            request_id=str(index), prompt_token_ids=prompt, params=params, max_tokens=max_tokens,
            stop_ids=frozenset(), seed=0,
        )  # fmt: skip
        scheduler.add([request])
    out: deque[Batch] = deque()
    steps = 0
    while scheduler.has_unfinished:
        while len(out) < 2 and (batch := scheduler.schedule()) is not None:
            out.append(batch)
            steps += 1
        batch = out.popleft()
        scheduler.update(batch, BatchResult([0] * len(batch.samples)))
    scheduler.check()
    stats = blocks.stats
    return Hits(stats.prompt_tokens, stats.cached_tokens, ideal_hits(prompts), stats.evicted_blocks, steps)


@click.command()
@click.option("--file", type=click.Path(path_type=Path), default=DATA / "workloads/fairytaleqa_shared_prefix.jsonl.gz")
@click.option("--blocks", "num_blocks", default=60_000, show_default=True, help="Blocks of the cache.")
@click.option("--block-size", default=16, show_default=True)
@click.option("--rows", default=256, show_default=True, help="Requests that run at once.")
@click.option("--budget", default=8192, show_default=True, help="Tokens of a step.")
@click.option("--max-tokens", default=32, show_default=True, help="Tokens of an answer.")
@click.option("--shuffle", is_flag=True, help="Questions in random order instead of tale by tale.")
@click.option("--seed", default=0, show_default=True)
def main(
    file: Path, num_blocks: int, block_size: int, rows: int, budget: int, max_tokens: int, shuffle: bool, seed: int
) -> None:
    """Measure the hit rate of the prefix cache on questions about fairy tales."""
    prompts = read_prompts(file)
    if shuffle:
        random.Random(seed).shuffle(prompts)
    table = Table(title=f"{len(prompts):,} requests, {num_blocks:,} blocks of {block_size}")
    for column in ("aware", "prompt tokens", "cached", "ideal", "of the ideal", "evicted blocks", "steps"):
        table.add_column(column, justify="right")
    for aware in (True, False):
        hits = measure(
            prompts, num_blocks=num_blocks, block_size=block_size, rows=rows, budget=budget, max_tokens=max_tokens,
            aware=aware,
        )  # fmt: skip
        share = hits.cached_tokens / hits.ideal_tokens
        figures = (hits.prompt_tokens, hits.cached_tokens, hits.ideal_tokens)
        table.add_row(
            str(aware), *(f"{n:,}" for n in figures), f"{share:.2%}", f"{hits.evicted_blocks:,}", str(hits.steps)
        )
    Console().print(table)


if __name__ == "__main__":
    main()
