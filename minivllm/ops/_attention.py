"""What flash_attention and paged_attention share: the formula in plain PyTorch, and the checks of their arguments."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from minivllm.ops._check import Check

MAX_HEAD_DIM = 256
_QUERIES_AT_ONCE = 512  # bounds the matrix of scores


def check_heads(check: Check) -> None:
    num_heads, num_kv_heads, head_dim = (check.sizes[word] for word in ("num_heads", "num_kv_heads", "head_dim"))
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        check.fail(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        check.fail(f"head_dim={head_dim}, expected 1 to {MAX_HEAD_DIM}")


def check_scores(check: Check, window: int, softcap: float, causal: bool = True) -> None:
    """The options that change scores or hide keys."""
    if window < 0:
        check.fail(f"window={window}, expected 0 (off) or a number of keys")
    if window > 0 and not causal:
        check.fail(f"window={window} needs causal=True")
    if not (softcap >= 0.0 and math.isfinite(softcap)):
        check.fail(f"softcap={softcap:f}, expected 0 (off) or a positive number")


def check_prefix_sums(check: Check, name: str, sums: list[int], total: int, longest: int) -> None:
    """cu_seqlens_`name` begins with 0, never falls, takes no step above `longest`, and ends within `total` rows."""
    if not sums:
        check.fail(f"cu_seqlens_{name} is empty, expected batch + 1 numbers")
    if sums[0] != 0:
        check.fail(f"cu_seqlens_{name} begins with {sums[0]}, expected 0")
    for i, (begin, end) in enumerate(pairwise(sums)):
        if not 0 <= end - begin <= longest:
            check.fail(
                f"cu_seqlens_{name} gives sequence {i} a length of {end - begin}, "
                f"expected 0 to max_seqlen_{name}={longest}"
            )
    if sums[-1] > total:
        check.fail(f"cu_seqlens_{name} ends with {sums[-1]}, but there are only {total} rows")


def empty_lse(q: Tensor, return_lse: bool) -> Tensor:
    """The second result of both ops: [num_tokens, num_heads] float32, without rows unless it is asked for."""
    return q.new_empty((q.shape[0] if return_lse else 0, q.shape[1]), dtype=torch.float32)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """One sequence, arithmetic in float32.

    Args:
        q: [len_q, num_heads, head_dim].
        k, v: [len_k, num_kv_heads, head_dim].
        scale, causal, window, softcap: as in `flash_attention`.

    Returns:
        Like q, and the logarithm of each query's sum of exponentials, [len_q, num_heads] float32.
    """
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    position = (torch.arange(len(q), device=q.device) + (len(k) - len(q))).unsqueeze(1)
    key = torch.arange(len(k), device=q.device)
    visible = (key <= position) if causal else torch.ones_like(key <= position)  # [len_q, len_k]
    if window:
        visible &= key > position - window
    outs, lses = [], []
    for start in range(0, len(q), _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        scores = torch.einsum("qhgd,khd->hgqk", grouped[rows] * scale, k.float())
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible[rows], float("-inf"))
        # softmax of a row that sees no key is NaN
        weights = scores.softmax(-1).masked_fill(~visible[rows], 0.0)
        outs.append(torch.einsum("hgqk,khd->qhgd", weights, v.float()))
        lses.append(scores.logsumexp(-1).permute(2, 0, 1))
    return torch.cat(outs).flatten(1, 2).to(q.dtype), torch.cat(lses).flatten(1, 2)
