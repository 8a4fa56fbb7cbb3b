"""Greedy tokens equal those of `transformers` in float32, however the engine cuts, mixes, shares and delays the work.

Every cell of {chunk size} x {alone, mixed} x {large pool, pool of 32 blocks} x {cold, prefix hit, full hit} x {launch
and wait back to back, one step in flight}; then what must change nothing at temperature 0: order, arrival, cache and
sizes.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minivllm.batch import Batch
from minivllm.config import EngineConfig
from minivllm.engine import LLMEngine
from minivllm.request import Request
from minivllm.runner.model_runner import Pending
from minivllm.sampling_params import SamplingParams
from tests.scheduler_world import expect_short_answers
from tests.small_models import greedy_all, make_checkpoint

MAX_TOKENS = 56
GREEDY = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


class Oracle:
    """Prompts whose beginnings are shared, and what `transformers` continues them with."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        model = make_checkpoint(folder, "gqa-tied", seed)
        rng = random.Random(seed)
        stem = rng.choices(range(199), k=40)
        lengths = [(24, 7), (16, 8), (0, 21), (24, 5), (8, 9), (32, 3), (16, 11), (40, 2)]  # (shared, own)
        self.cold = [stem[:shared] + rng.choices(range(199), k=own) for shared, own in lengths]
        self.again = [prompt[:-4] + rng.choices(range(199), k=9) for prompt in self.cold]
        prompts = self.cold + self.again
        answers = greedy_all(model, prompts, MAX_TOKENS)
        self.expected = {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}

    def __getitem__(self, prompt: list[int]) -> list[int]:
        return self.expected[tuple(prompt)]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    torch.set_float32_matmul_precision("highest")
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    yield Oracle(tmp_path_factory.mktemp("model"), seed)


def make_engine(oracle: Oracle, device: str, **options: Any) -> LLMEngine:
    options = {"block_size": 8, "num_kv_blocks": 256, "max_num_seqs": 4, **options}
    return LLMEngine(oracle.folder, EngineConfig(device=device, dtype="float32", **options))


def serve(engine: LLMEngine, prompts: list[list[int]], depth: int, arrivals: list[int] | None = None) -> list[Request]:
    """Run all prompts with up to `depth` batches out at once; prompt i arrives after arrivals[i] steps."""
    arrivals = arrivals or [0] * len(prompts)
    left = sorted(range(len(prompts)), key=lambda index: arrivals[index])
    requests: dict[int, Request] = {}
    out: deque[tuple[Batch, Pending]] = deque()
    step = 0
    while left or engine.has_unfinished:
        while left and arrivals[left[0]] <= step:
            index = left.pop(0)
            [requests[index]] = engine.add_request(f"r{index}", prompts[index], GREEDY)
        while len(out) < depth and (batch := engine.scheduler.schedule()) is not None:
            out.append((batch, engine.runner.launch(batch)))
        if out:
            batch, pending = out.popleft()
            engine.scheduler.update(batch, pending.wait())
            engine.scheduler.check()
        step += 1
    return [requests[index] for index in range(len(prompts))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_blocks", [256, 32])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_every_cell(oracle: Oracle, chunk: int, mixed: bool, num_blocks: int, depth: int, device: str) -> None:
    seqs, count = (8, 8) if mixed else (1, 3)
    engine = make_engine(
        oracle, device, max_num_seqs=seqs, max_num_batched_tokens=max(chunk, seqs), num_kv_blocks=num_blocks
    )
    for prompts in (oracle.cold[:count], oracle.again[:count], oracle.again[:count]):  # cold, a prefix hit, a full one
        warm = prompts[0] in oracle.again
        expect_short_answers(engine.scheduler)
        groups = [prompts] if mixed else [[prompt] for prompt in prompts]
        requests = [request for group in groups for request in serve(engine, group, depth)]
        for request, prompt in zip(requests, prompts, strict=True):
            assert request.output_token_ids == oracle[prompt]
        hits = [request.num_cached_tokens for request in requests]
        if num_blocks == 256 and warm:
            assert all(hits), "every prompt of the second and third round shares a beginning with an earlier one"
        if mixed and num_blocks == 32:
            assert sum(request.num_preemptions for request in requests), "the small pool was not small enough"


def test_a_full_hit_is_full(oracle: Oracle) -> None:
    engine = make_engine(oracle, "cpu")
    serve(engine, oracle.cold, 1)
    again = serve(engine, oracle.cold, 1)
    whole = [(len(prompt) - 1) // 8 * 8 for prompt in oracle.cold]
    full = [len(prompt) - 1 if len(prompt) % 8 == 0 else hit for prompt, hit in zip(oracle.cold, whole, strict=True)]
    assert [request.num_cached_tokens for request in again] == full
    assert any(len(prompt) % 8 == 0 for prompt in oracle.cold)


@pytest.mark.parametrize("trial", range(3))
def test_order_arrival_cache_and_sizes_change_nothing(oracle: Oracle, trial: int, seed: int) -> None:
    rng = random.Random(seed + trial)
    prompts = rng.sample(oracle.cold + oracle.again, 8)
    engine = make_engine(
        oracle,
        "cpu",
        block_size=rng.choice([8, 16, 32, 64]),
        num_kv_blocks=rng.choice([40, 256]),
        max_num_seqs=rng.randint(1, 8),
        max_num_batched_tokens=rng.randint(8, 100),
        enable_prefix_caching=rng.random() < 0.5,
        prefix_aware_scheduling=rng.random() < 0.5,
        scheduling_policy=rng.choice(["fcfs", "priority"]),
    )
    for _ in range(2):
        requests = serve(engine, prompts, rng.randint(1, 3), [rng.randint(0, 60) for _ in prompts])
        assert [request.output_token_ids for request in requests] == [oracle[prompt] for prompt in prompts]
