"""Exact attention over packed sequences (`flash_attention`) and over the paged key-value cache (`paged_attention`).

softmax(q k^T * scale) v with grouped queries: query head h reads key-value head h // (num_heads / num_kv_heads).
Neither op stores the matrix of scores: keys pass in tiles under an online softmax (Dao et al. 2022,
arXiv:2205.14135), and pages of the cache are found through a block table (Kwon et al. 2023, arXiv:2309.06180). Causal
masks are aligned to the last query and key.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check
from minivllm.ops._register import define
from minivllm.ops.store_kv import check_cache

MAX_HEAD_DIM = 256
_QUERIES_AT_ONCE = 512  # bounds the references' matrix of scores


def _check_heads(check: Check) -> None:
    num_heads, num_kv_heads, head_dim = (check.sizes[word] for word in ("num_heads", "num_kv_heads", "head_dim"))
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        check.fail(f"num_heads={num_heads} is not a multiple of num_kv_heads={num_kv_heads}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        check.fail(f"head_dim={head_dim}, expected 1 to {MAX_HEAD_DIM}")


def _check_flash(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    check = Check("flash_attention", q.device)
    check.tensor("q", q, "total_q num_heads head_dim", FLOATS)
    check.tensor("k", k, "total_k num_kv_heads head_dim", (q.dtype,))
    check.tensor("v", v, "total_k num_kv_heads head_dim", (q.dtype,))
    check.tensor("cu_seqlens_q", cu_seqlens_q, "batch+1", (torch.int32,))
    check.tensor("cu_seqlens_k", cu_seqlens_k, "batch+1", (torch.int32,))
    _check_heads(check)


def _check_prefix_sums(op: str, name: str, sums: list[int], total: int, longest: int) -> None:
    def fail(text: str) -> None:
        raise RuntimeError(f"minivllm::{op}: cu_seqlens_{name} {text}")

    if not sums:
        fail("is empty, expected batch + 1 numbers")
    if sums[0] != 0:
        fail(f"begins with {sums[0]}, expected 0")
    for i, (begin, end) in enumerate(pairwise(sums)):
        if not 0 <= end - begin <= longest:
            fail(f"gives sequence {i} a length of {end - begin}, expected 0 to max_seqlen_{name}={longest}")
    if sums[-1] > total:
        fail(f"ends with {sums[-1]}, but there are only {total} rows")


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    """One sequence. q: [len_q, num_heads, head_dim]; k, v: [len_k, num_kv_heads, head_dim]; the result is like q."""
    grouped = q.float().unflatten(1, (k.shape[1], -1))
    last_seen = torch.arange(len(q), device=q.device) + (len(k) - len(q))
    visible = torch.arange(len(k), device=q.device) <= last_seen.unsqueeze(1)  # [len_q, len_k]
    if not causal:
        visible = torch.ones_like(visible)
    parts = []
    for start in range(0, len(q), _QUERIES_AT_ONCE):
        rows = slice(start, start + _QUERIES_AT_ONCE)
        scores = torch.einsum("qhgd,khd->hgqk", grouped[rows] * scale, k.float())
        weights = scores.masked_fill(~visible[rows], float("-inf")).softmax(-1)
        weights = weights.masked_fill(~visible[rows], 0.0)  # softmax of a row that sees no key is NaN
        parts.append(torch.einsum("hgqk,khd->qhgd", weights, v.float()))
    return torch.cat(parts).flatten(1, 2).to(q.dtype)


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    causal: bool = True,
) -> Tensor:
    """The op's meaning in plain PyTorch, sequence by sequence. Reads the lengths on the host: one sync on CUDA."""
    _check_flash(q, k, v, cu_seqlens_q, cu_seqlens_k)
    ends_q, ends_k = torch.stack((cu_seqlens_q, cu_seqlens_k)).tolist()
    _check_prefix_sums("flash_attention", "q", ends_q, len(q), max_seqlen_q)
    _check_prefix_sums("flash_attention", "k", ends_k, len(k), max_seqlen_k)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for i in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        if rows.start < rows.stop:
            out[rows] = _attend(q[rows], k[keys], v[keys], scale, causal)
    return out


def _flash_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    causal: bool = True,
) -> Tensor:
    _check_flash(q, k, v, cu_seqlens_q, cu_seqlens_k)
    return q.new_empty(q.shape)


_flash_attention = define(
    "flash_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, *, float scale, bool causal=True) -> Tensor",
    flash_attention_reference,
    _flash_fake,
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    causal: bool = True,
) -> Tensor:
    """Attention of sequences that lie one after the other in q, k and v.

    The arithmetic is float32. On the CPU a row's bits depend on its query and the keys and values it sees alone: not
    on other rows or the number of threads, and `paged_attention` gives the same bits. (A NaN or infinite value may
    spoil queries just before it.)

    Args:
        q: [total_q, num_heads, head_dim] float32, bfloat16 or float16; last dimension contiguous, any other strides.
            head_dim is 1 to 256 (multiples of 16 are fastest); num_heads is a multiple of num_kv_heads.
        k: [total_k, num_kv_heads, head_dim], dtype of q; strides as q.
        v: like k.
        cu_seqlens_q: [batch + 1] int32; the queries of sequence i are rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q.
        cu_seqlens_k: [batch + 1] int32, the same for k and v.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
        scale: factor of the scores, usually head_dim ** -0.5.
        causal: query i of a sequence sees the keys j <= i + len_k - len_q; otherwise it sees all keys.

    Returns:
        [total_q, num_heads, head_dim], contiguous, dtype of q. A query that sees no key, and a row beyond the last
        sequence, is 0.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides; from the CPU kernel and the reference also lengths that
            do not fit.
    """
    out: Tensor = _flash_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=scale, causal=causal
    )
    return out


def _check_paged(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor
) -> None:
    check = Check("paged_attention", q.device)
    check.tensor("q", q, "num_tokens num_heads head_dim", FLOATS)
    check_cache(check, "k_cache", k_cache, q.dtype)
    check_cache(check, "v_cache", v_cache, q.dtype)
    check.tensor("block_tables", block_tables, "num_seqs max_blocks", (torch.int32,))
    check.tensor("seq_lens", seq_lens, "num_seqs", (torch.int32,))
    check.tensor("cu_seqlens_q", cu_seqlens_q, "num_seqs+1", (torch.int32,))
    num_seqs = block_tables.shape[0]
    if cu_seqlens_q.shape[0] != num_seqs + 1:
        check.fail(f"cu_seqlens_q has {cu_seqlens_q.shape[0]} numbers, expected num_seqs + 1 = {num_seqs + 1}")
    _check_heads(check)


def _check_blocks(num_blocks: int, block_size: int, block_tables: Tensor, lengths: list[int]) -> None:
    limit = block_tables.shape[1] * block_size
    for i, length in enumerate(lengths):
        if not 0 <= length <= limit:
            raise RuntimeError(
                f"minivllm::paged_attention: seq_lens[{i}] is {length}, expected 0 to {limit} (max_blocks * block_size)"
            )
        if block_tables.device.type != "cpu":
            continue
        for b, block in enumerate(block_tables[i, : -(-length // block_size)].tolist()):
            if not 0 <= block < num_blocks:
                raise RuntimeError(
                    f"minivllm::paged_attention: block_tables[{i}][{b}] is {block}, expected 0 to {num_blocks - 1}"
                )


def _gather(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The first `length` rows of a sequence: [length, num_kv_heads, head_dim]."""
    return cache[blocks].transpose(1, 2).flatten(0, 1)[:length]


def paged_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    *,
    scale: float,
) -> Tensor:
    """The op's meaning in plain PyTorch, sequence by sequence. Reads the lengths on the host: one sync on CUDA."""
    _check_paged(q, k_cache, v_cache, block_tables, seq_lens, cu_seqlens_q)
    block_size, num_seqs = k_cache.shape[2], len(seq_lens)
    numbers = torch.cat((cu_seqlens_q, seq_lens)).tolist()
    ends, lengths = numbers[: num_seqs + 1], numbers[num_seqs + 1 :]
    _check_prefix_sums("paged_attention", "q", ends, len(q), max_seqlen_q)
    _check_blocks(k_cache.shape[0], block_size, block_tables, lengths)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for i, length in enumerate(lengths):
        rows, blocks = slice(ends[i], ends[i + 1]), block_tables[i, : -(-length // block_size)]
        if rows.start < rows.stop:
            k, v = _gather(k_cache, blocks, length), _gather(v_cache, blocks, length)
            out[rows] = _attend(q[rows], k, v, scale, True)
    return out


def _paged_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    *,
    scale: float,
) -> Tensor:
    _check_paged(q, k_cache, v_cache, block_tables, seq_lens, cu_seqlens_q)
    return q.new_empty(q.shape)


_paged_attention = define(
    "paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, Tensor cu_seqlens_q, "
    "SymInt max_seqlen_q, *, float scale) -> Tensor",
    paged_attention_reference,
    _paged_fake,
)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    *,
    scale: float,
) -> Tensor:
    """Causal attention of new tokens over the cache, which holds their own keys and values already.

    Prefill, chunks of a prompt and decode are the same: sequence i has some queries, and they are the last tokens of
    its seq_lens[i]. The arithmetic is float32. On the CPU a row's bits depend on its query and the keys and values it
    sees alone: not on other rows, on the chunks a prompt is cut into, on which blocks hold the keys, or on the number
    of threads. (A NaN or infinite value may spoil queries of its own sequence just before it.)

    Args:
        q: [num_tokens, num_heads, head_dim] float32, bfloat16 or float16; last dimension contiguous, any other strides.
            head_dim is 1 to 256 (multiples of 16 are fastest); num_heads is a multiple of num_kv_heads.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of q; layout as in `minivllm.ops.store_kv`.
        v_cache: like k_cache.
        block_tables: [num_seqs, max_blocks] int32, last dimension contiguous: the blocks of each sequence in order.
            Entries that its length does not reach are never read, nor are the slots beyond its length.
        seq_lens: [num_seqs] int32: keys in the cache for each sequence, those of this step included.
        cu_seqlens_q: [num_seqs + 1] int32; the queries of sequence i are rows cu_seqlens_q[i] to cu_seqlens_q[i + 1]
            of q.
        max_seqlen_q: no sequence has more queries.
        scale: factor of the scores, usually head_dim ** -0.5.

    Returns:
        [num_tokens, num_heads, head_dim], contiguous, dtype of q. A query that sees no key, and a row beyond the last
        sequence, is 0.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides; from the CPU kernel and the reference also lengths that
            do not fit, and on the CPU a used block table entry that is not a block.
    """
    out: Tensor = _paged_attention(q, k_cache, v_cache, block_tables, seq_lens, cu_seqlens_q, max_seqlen_q, scale=scale)
    return out
