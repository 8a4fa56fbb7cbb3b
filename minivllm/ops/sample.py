"""Draws one token for each row of logits: temperature, top-k, top-p and min-p, then the Gumbel-max trick.

The noise of a token is a pure function of (seed, token index) through the counter-based generator Philox, and every
filter is a threshold on the value rather than a rank. So a draw depends on its own row and seed alone: not on the batch
around it, the device, the number of threads or the order of a sort, and every implementation gives the same token up to
float32 rounding near ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check
from minivllm.ops._register import define

_LARGEST = torch.finfo(torch.float32).max
_MASK = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32_7(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-7 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3").

    Seven rounds are the fewest that the paper calls Crush-resistant; ten would take a GPU a seventh longer to sample.

    Args:
        counter: four int64 tensors of 32-bit words that broadcast with each other and the key.
        key: two int64 tensors of 32-bit words.

    Returns:
        Four int64 tensors of random 32-bit words. A product of two words wraps in int64; its bits are right even so.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(7):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (product1 >> 32 & _MASK) ^ c1 ^ k0, (product0 >> 32 & _MASK) ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def philox_words(seeds: Tensor, vocab: int) -> Tensor:
    """[num_rows, vocab] int64: token i has word i % 4 of Philox with counter (i // 4, 0, 0, 0) and the seed as key."""
    blocks = torch.arange((vocab + 3) // 4, device=seeds.device).unsqueeze(0)
    zero = torch.zeros_like(blocks)
    key = (seeds & _MASK).unsqueeze(1), (seeds >> 32 & _MASK).unsqueeze(1)
    return torch.stack(philox_4x32_7((blocks, zero, zero, zero), key), -1).flatten(1)[:, :vocab]


def gumbel_noise(words: Tensor) -> Tensor:
    """Float32 -log(-log(1 - u)) of 32-bit words, u = (word + 0.5) / 2^32 rounded to float32 and kept below 1.

    Large noise comes from small u, where float32 is densest, so that very unlikely tokens are still drawn as often as
    they should.
    """
    u = (words.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def kept_threshold(z: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[num_rows] float32: a token is kept when its scaled logit in z: [num_rows, vocab] reaches this value."""
    vocab = z.shape[1]
    ordered = z.sort(dim=-1, descending=True).values
    off = torch.full_like(top_p, -torch.inf)
    kth = ordered.gather(1, (top_k.long() - 1).clamp(0, vocab - 1).unsqueeze(1)).squeeze(1)
    by_rank = torch.where((top_k > 0) & (top_k < vocab), kth, off)
    weights = ordered.double().exp().masked_fill(ordered < by_rank.unsqueeze(1), 0)
    mass = weights.cumsum(-1)
    needed = top_p.double() * mass[:, -1]
    last = (mass < needed.unsqueeze(1)).sum(-1).clamp(max=vocab - 1)
    by_mass = torch.where(top_p < 1, ordered.gather(1, last.unsqueeze(1)).squeeze(1), off)
    by_ratio = torch.where(min_p > 0, min_p.clamp(max=1).log(), off)
    return torch.maximum(torch.maximum(by_rank, by_mass), by_ratio)


def _check_sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor
) -> None:
    check = Check("sample", logits.device)
    check.tensor("logits", logits, "num_rows vocab", FLOATS)
    check.tensor("temperature", temperature, "num_rows", (torch.float32,))
    check.tensor("top_k", top_k, "num_rows", (torch.int32,))
    check.tensor("top_p", top_p, "num_rows", (torch.float32,))
    check.tensor("min_p", min_p, "num_rows", (torch.float32,))
    check.tensor("seeds", seeds, "num_rows", (torch.int64,))


def sample_reference(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor
) -> Tensor:
    """The op's meaning in plain PyTorch; it never waits for the device."""
    _check_sample(logits, temperature, top_k, top_p, min_p, seeds)
    if logits.shape[1] == 0:
        return torch.full_like(seeds, -1)
    wide = logits.float()
    largest = wide.amax(-1, keepdim=True)  # NaN where the row has one
    valid = (largest.abs() <= _LARGEST).squeeze(1)
    greedy = ~(temperature > 0)
    z = (wide - largest) / temperature.masked_fill(greedy, 1).unsqueeze(1)
    threshold = kept_threshold(z, top_k, top_p, min_p)
    scores = (z + gumbel_noise(philox_words(seeds, logits.shape[1]))).masked_fill(
        z < threshold.unsqueeze(1), -torch.inf
    )
    drawn = torch.where(greedy.unsqueeze(1), wide, scores).argmax(-1)
    return drawn.masked_fill(~valid, -1)


def _sample_fake(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor
) -> Tensor:
    _check_sample(logits, temperature, top_k, top_p, min_p, seeds)
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


_sample = define(
    "sample",
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds) -> Tensor",
    sample_reference,
    _sample_fake,
)


def sample(
    logits: Tensor, *, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor
) -> Tensor:
    """One token id for each row, drawn from softmax(logits / temperature) after the filters.

    Order, with z = (logits - max(logits)) / temperature in float32: top-k keeps the tokens with z at least the k-th
    largest; top-p keeps, of the probabilities renormalised over those, the largest ones until their sum reaches top_p;
    min-p keeps the tokens at least min_p times as likely as the most likely one. Tokens equal to the last one kept are
    kept too. Of the kept tokens the one with the largest z + Gumbel noise (`gumbel_noise`) is drawn, the lowest index
    of equals. The seed alone makes the noise: give each row a new seed each step.

    Args:
        logits: [num_rows, vocab] float32, bfloat16 or float16; rows may be strided, -inf masks a token.
        temperature: [num_rows] float32, finite; 0 takes the largest logit, the lowest index of equals.
        top_k: [num_rows] int32; off when <= 0 or >= vocab.
        top_p: [num_rows] float32; off when >= 1; the most likely token is kept however small it is.
        min_p: [num_rows] float32; off when <= 0; from 1 on only the most likely token is kept.
        seeds: [num_rows] int64, any value.

    Returns:
        [num_rows] int64; -1 for a row with NaN or +inf, or without a finite logit.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides.
    """
    out: Tensor = _sample(logits, temperature, top_k, top_p, min_p, seeds)
    return out
