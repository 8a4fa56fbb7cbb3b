"""What the tests of `sample` measure with: options of rows, an independent Philox, exact distributions, chi-square."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from minivllm.ops.sample import kept_threshold, philox_words, sample_reference
from tests.ops.support import generator, randn

INF = float("inf")


def parameters(
    num_rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The same options for every row; row r has seed `seed + r`."""
    return {
        "temperature": torch.full((num_rows,), temperature, device=device),
        "top_k": torch.full((num_rows,), top_k, dtype=torch.int32, device=device),
        "top_p": torch.full((num_rows,), top_p, device=device),
        "min_p": torch.full((num_rows,), min_p, device=device),
        "seeds": torch.arange(seed, seed + num_rows, device=device),
    }


def mixed_parameters(num_rows: int, vocab: int, seed: int) -> dict[str, Tensor]:
    """Every option on or off by a coin, over its whole range."""
    random = generator(seed)

    def draw() -> Tensor:
        return torch.rand(num_rows, generator=random)

    def coin() -> Tensor:
        return draw() < 0.5

    top_k = (vocab ** draw() * 1.2).int() + 1
    return {
        "temperature": torch.where(draw() < 0.1, 0.0, 0.05 + 2 * draw()),
        "top_k": torch.where(coin(), top_k, -(draw() * 3).int()),
        "top_p": torch.where(coin(), 1 - draw() ** 3, 1.0),
        "min_p": torch.where(coin(), draw() ** 4, 0.0),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=random),
    }


def assert_right_draws(got: Tensor, logits: Tensor, p: dict[str, Tensor]) -> None:
    """Every token is the reference's, or one that float32 rounding may take instead, and those are very few.

    Rounding may take a token that the filters, loosened by 2e-6, still keep, and whose score in float64 is within 8e-6
    of the best that the same filters, tightened by as much, leave.
    """
    expected = sample_reference(logits, **p)
    assert (got != expected).sum() <= 1 + len(got) // 1000
    rows = (p["temperature"] > 0) & (expected >= 0)
    assert torch.equal(got[~rows], expected[~rows])
    p = {name: value[rows] for name, value in p.items()}
    wide, got = logits[rows].float(), got[rows].unsqueeze(1)
    z = (wide - wide.amax(-1, keepdim=True)) / p["temperature"].unsqueeze(1)
    off = p["top_p"] >= 1
    loose, tight = (
        kept_threshold(z, p["top_k"], torch.where(off, 1.0, p["top_p"] * (1 + by)), p["min_p"] * (1 - by))
        for by in (2e-6, -2e-6)
    )
    assert (z.gather(1, got).squeeze(1) >= loose).all()
    u = ((philox_words(p["seeds"], z.shape[1]) + 0.5) / 2**32).clamp(max=1 - 2.0**-24)
    scores = z.double() - torch.log(-torch.log1p(-u))
    best = scores.masked_fill(z < tight.unsqueeze(1), -INF).amax(-1)
    assert (scores.gather(1, got).squeeze(1) >= best - 8e-6).all()


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-7 from the paper, in Python's integers."""
    for _ in range(7):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second % 2**32, first >> 32 ^ counter[3] ^ key[1], first % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


def exact_distribution(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """Probabilities in Python's float64, by sorting tokens (no ties among them)."""
    weights = {i: math.exp((logit - max(logits)) / temperature) for i, logit in enumerate(logits)}
    kept = sorted(weights, key=lambda i: -weights[i])[: top_k if top_k > 0 else None]
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if nucleus and mass >= top_p * total:
            break
        mass += weights[i]
        nucleus.append(i)
    nucleus = [i for i in nucleus if weights[i] >= min_p]
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(logits))]


def logits_clear_of_thresholds(vocab: int, seed: int, options: dict[str, Any]) -> Tensor:
    """Random logits whose kept set does not hang on rounding: filters moved by 1e-5 keep the same tokens."""
    for attempt in range(100):
        logits = randn(vocab, seed=seed + attempt, dtype=torch.float32, device="cpu", scale=1.5)
        kept = []
        for by in (1 - 1e-5, 1 + 1e-5):
            top_p = options["top_p"] * by if options["top_p"] < 1 else 1.0
            moved = options | {"top_p": top_p, "min_p": options["min_p"] * by}
            kept.append([p > 0 for p in exact_distribution(logits.tolist(), **moved)])
        if kept[0] == kept[1]:
            return logits
    raise AssertionError("no logits found")


def chi_square_p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's test; tokens expected fewer than 50 times are counted together. A token of probability 0 gives 0."""
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities * counts.sum()
    rare = expected < 50
    observed = torch.cat([counts[~rare], counts[rare].sum().unsqueeze(0)]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum().unsqueeze(0)])
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) < 2:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2).item()
