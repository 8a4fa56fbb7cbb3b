"""What only the CUDA kernels of `sample` can get wrong: rows cut among blocks, thresholds over large rows, graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from tests.ops.sample_support import (
    assert_right_draws,
    chi_square_p_value,
    exact_distribution,
    mixed_parameters,
    parameters,
)
from tests.ops.support import FLOAT_DTYPES, generator, randn

pytestmark = pytest.mark.gpu
VOCAB = 151_936
REJECT = 1e-8


def on_gpu(p: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in p.items()}


def test_kernels_serve_cuda() -> None:
    assert ops.served_by()["sample"]["CUDA"] == "kernel"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_draws_are_the_cpu_kernels(dtype: torch.dtype, seed: int) -> None:
    """Over 100,000 rows; what differs is near a tie or a threshold, as `assert_right_draws` demands of every row."""
    num_rows, vocab = 40_000, 300
    logits = (randn(num_rows, vocab, seed=seed, dtype=torch.float32, device="cpu", scale=3.0)).to(dtype)
    p = mixed_parameters(num_rows, vocab, seed + 1)
    got, on_cpu = ops.sample(logits.cuda(), **on_gpu(p)).cpu(), ops.sample(logits, **p)
    assert (got != on_cpu).sum() <= num_rows // 5000
    assert_right_draws(got, logits, p)


@pytest.mark.parametrize("options", ({}, {"top_k": 30, "top_p": 0.9}, {"min_p": 0.02}), ids=str)
def test_a_million_draws(options: dict[str, Any], seed: int) -> None:
    full = {"temperature": 0.9, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    logits = torch.linspace(-2, 2, 64) * torch.linspace(0.3, 1.7, 64)
    tokens = ops.sample(logits.cuda().expand(1_000_000, 64), **parameters(1_000_000, seed=seed, device="cuda", **full))
    exact = torch.tensor(exact_distribution(logits.tolist(), **full)).double()
    assert chi_square_p_value(torch.bincount(tokens.cpu(), minlength=64), exact) > REJECT


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", (VOCAB, 50_257))
def test_a_draw_does_not_depend_on_the_batch(dtype: torch.dtype, vocab: int, seed: int) -> None:
    logits = randn(300, vocab, seed=seed, dtype=dtype, device="cuda", scale=2.0)
    p = on_gpu(mixed_parameters(300, vocab, seed + 1))
    together = ops.sample(logits, **p)
    for size in (1, 7, 60):  # cut into other numbers of blocks
        for start in range(0, 180, 60):
            rows = slice(start, start + size)
            part = ops.sample(logits[rows], **{name: value[rows] for name, value in p.items()})
            assert torch.equal(part, together[rows])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", ("flat", "peaked", "equal", "two values", "huge", "ascending"))
def test_large_rows(dtype: torch.dtype, shape: str, seed: int) -> None:
    rows = 9
    logits = randn(rows, VOCAB, seed=seed, dtype=torch.float32, device="cpu")
    if shape == "peaked":
        logits = logits.abs().pow(3).neg() * 3
    elif shape == "equal":
        logits = torch.full((rows, VOCAB), 1.5)
    elif shape == "two values":
        logits = (logits > 2).float()
    elif shape == "huge":
        logits *= 1e4
    elif shape == "ascending":
        logits = torch.linspace(-20, 5, VOCAB).expand(rows, VOCAB)
    logits = logits.to(dtype)
    p = mixed_parameters(rows, VOCAB, seed + 1)
    p["top_k"][:6] = torch.tensor([0, 2_000, 2_047, 20_000, VOCAB - 1, VOCAB], dtype=torch.int32)
    p["top_p"][3:9] = torch.tensor([0.9, 0.5, 1e-9, 1 - 2**-24, 0.99, 0.3])
    p["temperature"][3:9] = 1.0
    assert_right_draws(ops.sample(logits.cuda(), **on_gpu(p)).cpu(), logits, p)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("scale", (0.0, 0.5, 3.0))
def test_filters_that_refuse_the_best_tokens(dtype: torch.dtype, scale: float, seed: int) -> None:
    """A token that no filter asks about is drawn first; here most are refused, some several times over."""
    rows = 48
    logits = randn(rows, VOCAB, seed=seed, dtype=torch.float32, device="cuda", scale=scale)
    logits = (logits + 0.01 * torch.arange(VOCAB, device="cuda").remainder(97)).to(dtype)
    p = on_gpu(parameters(rows, seed=seed))
    p["top_p"][:36] = torch.linspace(0.001, 0.6, 36)
    p["min_p"][30:42] = torch.linspace(0.01, 0.9, 12)
    p["top_k"][20:30] = 5000
    p["top_k"][42:] = torch.tensor([1025, 1500, 2000, 4000, 8000, VOCAB - 1])
    got = ops.sample(logits, **p)
    unfiltered = on_gpu(parameters(rows, seed=seed))
    assert (got != ops.sample(logits, **unfiltered)).sum() > rows // 4
    assert_right_draws(got, logits, p)


def test_rows_beyond_2_to_the_31_elements(seed: int) -> None:
    stride = 2**31 + 8
    wide = torch.full((stride + 1000,), float("nan"), dtype=torch.bfloat16, device="cuda")
    logits = wide.as_strided((2, 1000), (stride, 1))
    logits.copy_(randn(2, 1000, seed=seed, dtype=torch.bfloat16, device="cuda"))
    for options in ({}, {"top_k": 9}, {"temperature": 0.0}):
        p = parameters(2, seed=seed, device="cuda", **options)
        assert torch.equal(ops.sample(logits, **p), ops.sample(logits.contiguous(), **p))


def test_a_graph_replays_other_options(seed: int) -> None:
    logits = randn(9, 5000, seed=seed, dtype=torch.bfloat16, device="cuda", scale=2.0)
    static = on_gpu(mixed_parameters(9, 5000, seed + 1))
    static_logits = logits.clone()
    ops.sample(static_logits, **static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.sample(static_logits, **static)
    for trial in range(4):
        p = on_gpu(mixed_parameters(9, 5000, seed + 2 + trial))
        for name, value in p.items():
            static[name].copy_(value)
        static_logits.copy_(logits.roll(trial, 0))
        graph.replay()
        assert torch.equal(out, ops.sample(logits.roll(trial, 0), **p))


@pytest.mark.parametrize("options", ({"temperature": 0.0}, {}, {"top_k": 50}, {"top_p": 0.9}), ids=str)
def test_one_bad_logit_in_a_large_row(options: dict[str, Any], seed: int) -> None:
    logits = randn(3, VOCAB, seed=seed, dtype=torch.bfloat16, device="cuda")
    p = parameters(3, seed=seed, device="cuda", **options)
    good = ops.sample(logits, **p)
    places = torch.randint(VOCAB, (8,), generator=generator(seed)).tolist()
    for place, bad in zip([0, VOCAB - 1, *places], [float("nan"), float("inf")] * 5, strict=True):
        broken = logits.clone()
        broken[1, place] = bad
        got = ops.sample(broken, **p)
        assert got[1] == -1 and got[0] == good[0] and got[2] == good[2]
