"""Parity with `transformers` in float32 on random small configs: teacher-forced logits and greedy tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.engine import LLMEngine
from minivllm.sampling_params import SamplingParams
from tests.small_models import SHAPES, exact_logits, greedy, make_checkpoint

GREEDY_TOKENS = 64
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def make_engine(folder: Path, device: str, **options: object) -> LLMEngine:
    return LLMEngine(folder, EngineConfig(device=device, dtype="float32", num_kv_blocks=128, **options))  # type: ignore[arg-type]


def run(engine: LLMEngine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    requests = [engine.add_request(f"r{i}", prompt, params)[0] for i, prompt in enumerate(prompts)]
    while engine.has_unfinished:
        engine.step()
        engine.scheduler.check()
    return [request.output_token_ids for request in requests]


@pytest.fixture(autouse=True)
def exact_matmul() -> None:
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_teacher_forced_logits(shape: str, device: str, tmp_path: Path, seed: int) -> None:
    oracle = make_checkpoint(tmp_path, shape, seed)
    engine = make_engine(tmp_path, device)
    ids = random.Random(seed).choices(range(199), k=100)
    ours = engine.runner.prompt_logits(ids).cpu()
    torch.testing.assert_close(ours, exact_logits(oracle, ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_alone_batched_and_chunked(shape: str, device: str, tmp_path: Path, seed: int) -> None:
    oracle = make_checkpoint(tmp_path, shape, seed)
    rng = random.Random(seed)
    prompts = [rng.choices(range(199), k=length) for length in (1, 15, 16, 17, 40)]
    expected = [greedy(oracle, prompt, GREEDY_TOKENS) for prompt in prompts]
    engine = make_engine(tmp_path, device)
    assert [run(engine, [prompt], GREEDY_TOKENS)[0] for prompt in prompts] == expected
    assert run(engine, prompts, GREEDY_TOKENS) == expected
    chunked = make_engine(tmp_path, device, max_num_seqs=3, max_num_batched_tokens=7, block_size=8)
    assert run(chunked, prompts, GREEDY_TOKENS) == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_narrow_dtypes_stay_near_float32(dtype: str, device: str, tmp_path: Path, seed: int) -> None:
    """Our error in a narrow dtype is at most twice that of `transformers` in the same dtype."""
    oracle = make_checkpoint(tmp_path, "gqa-tied", seed)
    ids = random.Random(seed).choices(range(199), k=100)
    exact = exact_logits(oracle, ids)
    theirs = exact_logits(oracle.to(getattr(torch, dtype)), ids).float()
    engine = LLMEngine(tmp_path, EngineConfig(device=device, dtype=dtype, num_kv_blocks=16))
    ours = engine.runner.prompt_logits(ids).cpu()
    error, their_error = ((logits - exact).square().mean().sqrt().item() for logits in (ours, theirs))
    assert error <= 2 * their_error
