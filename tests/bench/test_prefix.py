"""The prefix cache on the fairy-tale load: close to an ideal cache when everything fits, in any order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.prefix import common, ideal_hits, measure, read_prompts


def test_ideal_hits_by_hand(seed: int) -> None:
    assert ideal_hits([[1, 2, 3], [1, 2, 4], [1, 2, 3, 9], [5], [1, 2, 4]]) == 0 + 2 + 3 + 0 + 2
    rng = random.Random(seed)
    prompts = [rng.choices(range(3), k=rng.randint(1, 12)) for _ in range(200)]
    plain = 0
    for index, prompt in enumerate(prompts):
        plain += min(max((common(prompt, other) for other in prompts[:index]), default=0), len(prompt) - 1)
    assert ideal_hits(prompts) == plain


@pytest.mark.parametrize("shuffle", [False, True])
def test_fairy_tales_hit_as_an_ideal_cache_would(shuffle: bool, data_dir: Path, seed: int) -> None:
    prompts = read_prompts(data_dir / "workloads/fairytaleqa_shared_prefix.jsonl.gz")
    if shuffle:
        random.Random(seed).shuffle(prompts)
    hits = measure(prompts, num_blocks=60_000, block_size=16, rows=256, budget=8192, max_tokens=8, aware=True)
    assert hits.evicted_blocks == 0
    assert hits.cached_tokens >= 0.95 * hits.ideal_tokens
