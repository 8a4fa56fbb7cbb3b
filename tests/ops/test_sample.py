from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.sample import gumbel_noise, philox_4x32_7
from tests.ops.sample_support import (
    assert_right_draws,
    chi_square_p_value,
    exact_distribution,
    logits_clear_of_thresholds,
    mixed_parameters,
    parameters,
    plain_philox,
)
from tests.ops.support import DEVICES, FLOAT_DTYPES, generator, randn

NAN, INF = float("nan"), float("inf")
VOCABS = (1, 2, 3, 63, 64, 65, 1000, 4096, 20011)
REJECT = 1e-8  # a right kernel fails one chi-square test in 1e8


# ---- the random numbers ----


KNOWN_ANSWERS = (  # counter, key, result: the known-answer vectors published with Random123
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_known_answers(device: str, counter: str, key: str, result: str) -> None:
    c, k, r = ([int(word, 16) for word in text.split()] for text in (counter, key, result))
    assert plain_philox(c, k) == r
    c0, c1, c2, c3, k0, k1 = (torch.tensor([word], device=device) for word in c + k)
    assert [word.item() for word in philox_4x32_7((c0, c1, c2, c3), (k0, k1))] == r


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", (5, 70, 40003))
def test_equal_logits_draw_the_smallest_word_of_plain_philox(device: str, vocab: int, seed: int) -> None:
    seeds = [seed, -seed - 1, 2**63 - 1 - seed, -(2**63) + seed]
    p = parameters(len(seeds), device=device) | {"seeds": torch.tensor(seeds, device=device)}
    got = ops.sample(torch.zeros(len(seeds), vocab, device=device), **p).tolist()
    for value, token in zip(seeds, got, strict=True):
        key = [value % 2**32, value % 2**64 >> 32]
        words = [word for block in range((vocab + 3) // 4) for word in plain_philox([block, 0, 0, 0], key)][:vocab]
        assert words[token] >> 8 == min(words) >> 8  # float32 keeps 24 bits


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_finite_at_both_ends(device: str) -> None:
    words = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1], device=device)
    noise = gumbel_noise(words)
    assert torch.isfinite(noise).all() and (noise[:-1] >= noise[1:]).all()
    assert noise[0].item() == pytest.approx(33 * math.log(2), rel=1e-6)
    assert noise[2].item() == pytest.approx(-math.log(math.log(2)), rel=1e-6)
    assert noise[-1].item() == pytest.approx(-math.log(24 * math.log(2)), rel=1e-6)


# ---- kernel against reference ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_draws_are_the_references(device: str, dtype: torch.dtype, vocab: int, seed: int) -> None:
    num_rows = max(8, min(1000, 400_000 // vocab))
    scale = torch.rand(num_rows, 1, generator=generator(seed)) * 6
    logits = (randn(num_rows, vocab, seed=seed + 1, dtype=torch.float32, device="cpu") * scale).to(dtype)
    p = mixed_parameters(num_rows, vocab, seed + 2)
    got = ops.sample(logits.to(device), **{name: value.to(device) for name, value in p.items()})
    assert got.dtype == torch.int64 and got.device.type == device
    assert_right_draws(got.cpu(), logits, p)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ("many ties", "one cluster", "masked", "far outliers", "shifted"))
def test_draws_of_hard_rows_are_the_references(device: str, shape: str, seed: int) -> None:
    logits = randn(500, 777, seed=seed, dtype=torch.float32, device="cpu", scale=2.0)
    if shape == "many ties":
        logits.round_()
    elif shape == "one cluster":
        logits = 20 + logits * 1e-6
    elif shape == "masked":
        logits[logits < 1.5] = -INF
    elif shape == "far outliers":
        logits[:, ::3] = -1e30
        logits[:, 1::7] *= 1e-30
    else:
        logits += 1e4
    p = mixed_parameters(500, 777, seed + 1)
    got = ops.sample(logits.to(device), **{name: value.to(device) for name, value in p.items()})
    assert_right_draws(got.cpu(), logits, p)


@pytest.mark.parametrize("device", DEVICES)
def test_a_large_vocabulary(device: str, seed: int) -> None:
    logits = randn(6, 151_936, seed=seed, dtype=torch.float32, device="cpu", scale=3.0)
    for options in ({"temperature": 0.0}, {}, {"top_k": 50}, {"top_k": 3000}, {"top_p": 0.9}, {"min_p": 0.1}):
        p = parameters(6, seed=seed, **options)
        got = ops.sample(logits.to(device), **{name: value.to(device) for name, value in p.items()})
        assert_right_draws(got.cpu(), logits, p)


# ---- against exact distributions ----


FILTERS = (
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.07},
    {"temperature": 0.7, "top_k": 8, "top_p": 0.75},
    {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.2},
)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_frequencies_are_the_exact_probabilities(device: str, options: dict[str, Any], seed: int) -> None:
    num_draws, vocab = 40_000, 100
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    logits = logits_clear_of_thresholds(vocab, seed, options)
    rows = logits.to(device).expand(num_draws, vocab)
    tokens = ops.sample(rows, **parameters(num_draws, seed=seed, device=device, **options))
    exact = torch.tensor(exact_distribution(logits.tolist(), **options)).double()
    assert chi_square_p_value(torch.bincount(tokens.cpu(), minlength=vocab), exact) > REJECT


@pytest.mark.parametrize("wrong", ({"temperature": 1.2}, {"top_k": 12}, {"top_p": 0.8}, {"min_p": 0.5}), ids=str)
def test_frequencies_tell_a_wrong_option(wrong: dict[str, Any], seed: int) -> None:
    num_draws, vocab = 40_000, 40
    logits = torch.linspace(0, 3, vocab)
    right = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.1}
    tokens = ops.sample(logits.expand(num_draws, vocab), **parameters(num_draws, seed=seed, **right))
    counts = torch.bincount(tokens, minlength=vocab)
    for options, is_right in ((right, True), (right | wrong, False)):
        exact = torch.tensor(exact_distribution(logits.tolist(), **options)).double()
        assert (chi_square_p_value(counts, exact) > REJECT) == is_right


@pytest.mark.parametrize("device", DEVICES)
def test_an_unlikely_token_is_drawn_as_often_as_it_should(device: str, seed: int) -> None:
    num_draws, probability = 2_000_000, 2e-5
    logits = torch.tensor([0.0, math.log(probability)], device=device).expand(num_draws, 2)
    count = ops.sample(logits, **parameters(num_draws, seed=seed, device=device)).sum().item()
    assert 10 <= count <= 83  # Poisson of mean 40: outside with probability below 1e-8


@pytest.mark.parametrize("device", DEVICES)
def test_neighbouring_seeds_and_tokens_are_independent(device: str, seed: int) -> None:
    pairs = (
        ops.sample(torch.zeros(60_000, 8, device=device), **parameters(60_000, seed=seed, device=device))
        .view(-1, 2)
        .cpu()
    )
    counts = torch.bincount(pairs[:, 0] * 8 + pairs[:, 1], minlength=64)
    assert chi_square_p_value(counts, torch.full((64,), 1 / 64).double()) > REJECT


# ---- what the filters keep ----


def drawn_set(logits: list[float], *, draws: int = 4000, device: str = "cpu", **options: Any) -> set[int]:
    rows = torch.tensor(logits, device=device).expand(draws, -1)
    return set(ops.sample(rows, **parameters(draws, device=device, **options)).tolist())


@pytest.mark.parametrize("device", DEVICES)
def test_kept_sets(device: str) -> None:
    logs = [math.log(p) for p in (0.05, 0.4, 0.15, 0.3, 0.1)]
    cases: list[tuple[dict[str, Any], set[int]]] = [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 2**31 - 1}, {0, 1, 2, 3, 4}),
        ({"top_k": -1}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-30}, {1}),
        ({"top_p": 0.0}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.84}, {1, 2, 3}),
        ({"top_p": 0.96}, {0, 1, 2, 3, 4}),
        ({"top_k": 2, "top_p": 0.56}, {1}),  # 0.4 is 0.571 of what top-k leaves
        ({"top_k": 2, "top_p": 0.58}, {1, 3}),
        ({"min_p": 0.24}, {1, 2, 3, 4}),
        ({"min_p": 0.26}, {1, 2, 3}),
        ({"min_p": 1.0}, {1}),
        ({"min_p": 2.0}, {1}),
        ({"top_p": 0.96, "min_p": 0.74}, {1, 3}),
        ({"top_k": 3, "min_p": 0.74}, {1, 3}),
        ({"temperature": 0.5, "min_p": 0.15}, {1, 3}),  # ratios are squared: 0.14, 0.56
    ]
    for options, kept in cases:
        assert drawn_set(logs, device=device, **options) == kept, options


@pytest.mark.parametrize("device", DEVICES)
def test_ties_at_a_threshold_are_all_kept(device: str) -> None:
    assert drawn_set([1.0, 3.0, 2.0, 2.0, 2.0, 0.0], top_k=2, device=device) == {1, 2, 3, 4}
    assert drawn_set([0.0, 0.0, -9.0, 0.0, 0.0], top_p=0.3, device=device) == {0, 1, 3, 4}
    assert drawn_set([0.0, -9.0, 0.0], min_p=1.0, device=device) == {0, 2}
    assert drawn_set([5.0, 5.0, 1.0], top_k=1, device=device) == {0, 1}
    assert drawn_set([-0.0, 0.0, -4.0], top_k=1, device=device) == {0, 1}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_greedy_takes_the_lowest_index_of_equals(device: str, dtype: torch.dtype, vocab: int, seed: int) -> None:
    logits = randn(50, vocab, seed=seed, dtype=dtype, device=device).mul(2).round()
    expected = torch.tensor([row.index(max(row)) for row in logits.tolist()])
    assert torch.equal(ops.sample(logits, **parameters(50, temperature=0.0, device=device)).cpu(), expected)
    zeros = torch.tensor([[-1.0, -0.0, 0.0, -0.0]], device=device, dtype=dtype)
    assert ops.sample(zeros, **parameters(1, temperature=0.0, device=device)).item() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_top_k_of_one_is_the_argmax(device: str, seed: int) -> None:
    logits = torch.stack([torch.randperm(500, generator=generator(seed + i)) for i in range(50)]).float().to(device)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}, {"temperature": 1e-38}):
        got = ops.sample(logits, **parameters(50, seed=seed, device=device, **options))
        assert torch.equal(got, logits.argmax(-1)), options


# ---- unusual rows ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("options", ({"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5, "min_p": 0.1}), ids=str)
def test_invalid_rows_give_minus_one_alone(device: str, dtype: torch.dtype, options: dict[str, Any], seed: int) -> None:
    for vocab, place in ((7, 6), (200, 3), (200, 150)):
        logits = randn(7, vocab, seed=seed, dtype=dtype, device=device)
        p = parameters(7, seed=seed, device=device, **options)
        good = ops.sample(logits, **p)
        logits[1, place], logits[3, place], logits[4], logits[5, place] = NAN, INF, -INF, -NAN
        bad = torch.tensor([1, 3, 4, 5], device=device)
        assert torch.equal(ops.sample(logits, **p), good.index_fill(0, bad, -1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", ({"temperature": 0.0}, {}, {"top_k": 20}, {"top_p": 0.99}, {"min_p": 0.01}), ids=str
)
def test_masked_tokens_are_never_drawn(device: str, options: dict[str, Any], seed: int) -> None:
    logits = torch.full((2000, 300), -INF, device=device)
    allowed = torch.tensor([5, 64, 299], device=device)
    logits[:, allowed] = torch.tensor([-3.0e38, -3.0e38, -3.0e38], device=device)
    got = ops.sample(logits, **parameters(2000, seed=seed, device=device, **options))
    assert set(got.tolist()) == ({5} if options.get("temperature") == 0.0 else {5, 64, 299})
    logits[:, 299] = 0.0  # now one token alone has any mass
    assert (ops.sample(logits, **parameters(2000, seed=seed, device=device, **options)) == 299).all()


@pytest.mark.parametrize("device", DEVICES)
def test_huge_logits_and_tiny_temperatures(device: str) -> None:
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[-largest, 0.9 * largest, largest, 1.0]], device=device).expand(200, 4)
    for temperature in (0.0, 1e-45, 1e-3, 1.0, 1e3):
        got = ops.sample(logits, **parameters(200, temperature=temperature, device=device))
        assert (got == 2).all(), temperature
    tied = torch.tensor([3e38, 3e38, -3e38], device=device).expand(200, 3)
    assert set(ops.sample(tied, **parameters(200, temperature=1e-3, device=device)).tolist()) == {0, 1}


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_no_vocabulary(device: str) -> None:
    assert ops.sample(torch.empty(0, 50, device=device), **parameters(0, device=device)).tolist() == []
    assert ops.sample(torch.empty(3, 0, device=device), **parameters(3, device=device)).tolist() == [-1, -1, -1]
    assert ops.sample(torch.empty(0, 0, device=device), **parameters(0, device=device)).tolist() == []
    assert ops.sample(torch.tensor([[-7.0]], device=device), **parameters(1, device=device)).tolist() == [0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_draw_depends_on_its_row_and_seed_alone(device: str, dtype: torch.dtype, seed: int) -> None:
    wide = randn(40, 1500, seed=seed, dtype=dtype, device=device, scale=2.0)
    p = {name: value.to(device) for name, value in mixed_parameters(40, 999, seed + 1).items()}
    together = ops.sample(wide[:, 3:1002], **p)  # strided rows that start at odd addresses
    assert torch.equal(together, ops.sample(wide[:, 3:1002].contiguous(), **p))
    order = torch.randperm(40, generator=generator(seed + 2)).to(device)
    shuffled = ops.sample(wide[order, 3:1002].contiguous(), **{name: value[order] for name, value in p.items()})
    assert torch.equal(shuffled, together[order])
    for r in (0, 17, 39):
        alone = ops.sample(wide[r : r + 1, 3:1002], **{name: value[r : r + 1] for name, value in p.items()})
        assert torch.equal(alone, together[r : r + 1])


def test_threads_do_not_change_draws(seed: int) -> None:
    logits = randn(64, 5000, seed=seed, dtype=torch.float32, device="cpu")
    p, threads = mixed_parameters(64, 5000, seed + 1), torch.get_num_threads()
    several = ops.sample(logits, **p)
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.sample(logits, **p), several)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
def test_arguments_are_not_written(device: str, seed: int) -> None:
    logits = randn(9, 300, seed=seed, dtype=torch.float32, device=device)
    p = {name: value.to(device) for name, value in mixed_parameters(9, 300, seed).items()}
    before = [tensor.clone() for tensor in (logits, *p.values())]
    ops.sample(logits, **p)
    assert all(torch.equal(old, new) for old, new in zip(before, (logits, *p.values()), strict=True))


# ---- the op as PyTorch sees it ----


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "logits dtype": ({"logits": torch.ones(4, 8, dtype=torch.float64)}, "logits has dtype"),
    "logits shape": ({"logits": torch.ones(8)}, r"logits has shape \[8\], expected \[num_rows, vocab\]"),
    "column stride": ({"logits": torch.ones(8, 4).T}, "logits must be contiguous in its last dimension"),
    "temperature dtype": ({"temperature": torch.ones(4).double()}, "temperature has dtype"),
    "temperature shape": (
        {"temperature": torch.ones(3)},
        r"temperature has shape \[3\], expected \[num_rows\] with num_rows=4",
    ),
    "temperature stride": ({"temperature": torch.ones(8)[::2]}, "temperature must be contiguous"),
    "top_k dtype": ({"top_k": torch.ones(4, dtype=torch.int64)}, "top_k has dtype"),
    "top_k shape": ({"top_k": torch.ones(4, 1, dtype=torch.int32)}, r"top_k has shape \[4, 1\]"),
    "top_p dtype": ({"top_p": torch.ones(4, dtype=torch.bfloat16)}, "top_p has dtype"),
    "top_p shape": ({"top_p": torch.ones(5)}, r"top_p has shape \[5\]"),
    "min_p dtype": ({"min_p": torch.ones(4, dtype=torch.int32)}, "min_p has dtype"),
    "min_p shape": ({"min_p": torch.tensor(0.1)}, r"min_p has shape \[\]"),
    "seeds dtype": ({"seeds": torch.ones(4, dtype=torch.int32)}, "seeds has dtype"),
    "seeds shape": ({"seeds": torch.ones(1, dtype=torch.int64)}, r"seeds has shape \[1\]"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(device: str, case: str) -> None:
    change, message = BAD[case]
    arguments = {"logits": torch.ones(4, 8), **parameters(4)} | change
    moved = {}
    for name, value in arguments.items():  # a plain .to() would make a strided view contiguous on another device
        moved[name] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
    with pytest.raises(RuntimeError, match=rf"minivllm::sample: {message}"):
        ops.sample(**moved)
