"""Exact attention over the paged key-value cache: prefill, chunks of a prompt and decode alike.

The formula is that of `flash_attention`; the pages of a sequence are found through a block table (Kwon et al. 2023,
arXiv:2309.06180). On CUDA, sequences with few queries are decoded by a kernel of their own, which splits long ones over
the GPU ("Flash-Decoding", Dao et al. 2023) as a plan says. The plan depends on lengths alone, so one serves all layers
of a step: `plan_paged_attention` makes it, on the GPU.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from minivllm.ops._attention import attend, check_heads, check_prefix_sums, check_scores, empty_lse
from minivllm.ops._check import FLOATS, Check
from minivllm.ops._register import define
from minivllm.ops.store_kv import check_cache


def _check_sequences(check: Check, seq_lens: Tensor, cu_seqlens_q: Tensor) -> None:
    check.tensor("seq_lens", seq_lens, "num_seqs", (torch.int32,))
    check.tensor("cu_seqlens_q", cu_seqlens_q, "num_seqs+1", (torch.int32,))
    num_seqs = seq_lens.shape[0]
    if cu_seqlens_q.shape[0] != num_seqs + 1:
        check.fail(f"cu_seqlens_q has {cu_seqlens_q.shape[0]} numbers, expected num_seqs + 1 = {num_seqs + 1}")


def _check_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    window: int,
    softcap: float,
    plan: Tensor | None,
) -> Check:
    check = Check("paged_attention", q.device)
    check.tensor("q", q, "num_tokens num_heads head_dim", FLOATS)
    check_cache(check, "k_cache", k_cache, q.dtype)
    check_cache(check, "v_cache", v_cache, q.dtype)
    check.tensor("block_tables", block_tables, "num_seqs max_blocks", (torch.int32,))
    _check_sequences(check, seq_lens, cu_seqlens_q)
    check_heads(check)
    check_scores(check, window, softcap)
    if plan is not None:
        check.tensor("plan", plan, "plan_words", (torch.int32,))
    return check


def plan_paged_attention_reference(
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    *,
    max_seqlen_k: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int = 0,
) -> Tensor:
    """Checks alone, and an empty plan: only the CUDA kernels follow one."""
    check = Check("plan_paged_attention", seq_lens.device)
    _check_sequences(check, seq_lens, cu_seqlens_q)
    if max_seqlen_k < 0:
        check.fail(f"max_seqlen_k is {max_seqlen_k}, expected 0 or more")
    check.sizes.update(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    check_heads(check)
    check_scores(check, window, 0.0)
    return seq_lens.new_empty(0)


def _plan_fake(seq_lens: Tensor, cu_seqlens_q: Tensor, max_seqlen_q: int, **shapes: int) -> Tensor:
    plan = plan_paged_attention_reference(seq_lens, cu_seqlens_q, max_seqlen_q, **shapes)
    # How long it is on CUDA depends on the GPU.
    return seq_lens.new_empty(torch.library.get_ctx().new_dynamic_size()) if seq_lens.device.type == "cuda" else plan


_plan_paged_attention = define(
    "plan_paged_attention",
    "(Tensor seq_lens, Tensor cu_seqlens_q, SymInt max_seqlen_q, *, SymInt max_seqlen_k, SymInt num_heads, "
    "SymInt num_kv_heads, SymInt head_dim, int window=0) -> Tensor",
    plan_paged_attention_reference,
    _plan_fake,
)


def plan_paged_attention(
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    *,
    max_seqlen_k: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int = 0,
) -> Tensor:
    """How the decode kernel of `paged_attention` shares out the work of these lengths; one plan serves all layers.

    It is computed on the GPU without a look at the lengths from the host, so that a CUDA graph may hold it.

    Args:
        seq_lens, cu_seqlens_q, max_seqlen_q, window: as they will be given to `paged_attention`.
        max_seqlen_k: the block table's width times the block size.
        num_heads, num_kv_heads, head_dim: shapes of the queries and the cache.

    Returns:
        int32 [n], opaque; also the kernel's scratch memory, so calls that share a plan must follow one another. On the
        CPU n is 0: there is nothing to plan.

    Raises:
        RuntimeError: wrong device, dtype or shape, or heads that do not fit each other.
    """
    plan: Tensor = _plan_paged_attention(
        seq_lens, cu_seqlens_q, max_seqlen_q,
        max_seqlen_k=max_seqlen_k, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, window=window,
    )  # fmt: skip
    return plan


def _check_blocks(check: Check, num_blocks: int, block_size: int, block_tables: Tensor, lengths: list[int]) -> None:
    limit = block_tables.shape[1] * block_size
    for i, length in enumerate(lengths):
        if not 0 <= length <= limit:
            check.fail(f"seq_lens[{i}] is {length}, expected 0 to {limit} (max_blocks * block_size)")
        if block_tables.device.type != "cpu":
            continue
        for b, block in enumerate(block_tables[i, : -(-length // block_size)].tolist()):
            if not 0 <= block < num_blocks:
                check.fail(f"block_tables[{i}][{b}] is {block}, expected 0 to {num_blocks - 1}")


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
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op's meaning in plain PyTorch, sequence by sequence. Reads the lengths on the host: one sync on CUDA."""
    check = _check_paged(q, k_cache, v_cache, block_tables, seq_lens, cu_seqlens_q, window, softcap, plan)
    block_size, num_seqs = k_cache.shape[2], len(seq_lens)
    numbers = torch.cat((cu_seqlens_q, seq_lens)).tolist()
    ends, lengths = numbers[: num_seqs + 1], numbers[num_seqs + 1 :]
    check_prefix_sums(check, "q", ends, len(q), max_seqlen_q)
    _check_blocks(check, k_cache.shape[0], block_size, block_tables, lengths)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = empty_lse(q, return_lse).fill_(float("-inf"))
    for i, length in enumerate(lengths):
        rows, blocks = slice(ends[i], ends[i + 1]), block_tables[i, : -(-length // block_size)]
        if rows.start < rows.stop:
            k, v = _gather(k_cache, blocks, length), _gather(v_cache, blocks, length)
            out[rows], sums = attend(q[rows], k, v, scale, True, window, softcap)
            if return_lse:
                lse[rows] = sums
    return out, lse


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
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
    plan: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_paged(q, k_cache, v_cache, block_tables, seq_lens, cu_seqlens_q, window, softcap, plan)
    return q.new_empty(q.shape), empty_lse(q, return_lse)


_paged_attention = define(
    "paged_attention",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor seq_lens, Tensor cu_seqlens_q, "
    "SymInt max_seqlen_q, *, float scale, int window=0, float softcap=0.0, bool return_lse=False, "
    "Tensor(a!)? plan=None) -> (Tensor, Tensor)",
    paged_attention_reference,
    _paged_fake,
)


@overload
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
    window: int = ...,
    softcap: float = ...,
    return_lse: Literal[False] = ...,
    plan: Tensor | None = ...,
) -> Tensor: ...


@overload
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
    window: int = ...,
    softcap: float = ...,
    return_lse: Literal[True],
    plan: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


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
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
    plan: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of new tokens over the cache, which holds their own keys and values already.

    Prefill, chunks of a prompt and decode are the same: sequence i has some queries, and they are the last tokens of
    its seq_lens[i]. The arithmetic is float32; on CUDA bfloat16 and float16 enter the tensor cores, and weights are
    rounded to that dtype before they meet the values. On the CPU a row's bits depend on its query and the keys and
    values it sees alone: not on other rows, on the chunks a prompt is cut into, on which blocks hold the keys, or on
    the number of threads. On CUDA the bits of a decoded row do not depend on other rows or on which blocks hold the
    keys. (A NaN or infinite value may spoil queries of its own sequence just before it, and with a window just after
    it.)

    Args:
        q: [num_tokens, num_heads, head_dim] float32, bfloat16 or float16; last dimension contiguous, any other strides.
            head_dim is 1 to 256 (64, 96, 128 and 256 are fastest); num_heads is a multiple of num_kv_heads.
        k_cache: [num_blocks, num_kv_heads, block_size, head_dim], dtype of q; layout as in `minivllm.ops.store_kv`.
        v_cache: like k_cache.
        block_tables: [num_seqs, max_blocks] int32, last dimension contiguous: the blocks of each sequence in order.
            Entries that its length does not reach are never read, nor are the slots beyond its length.
        seq_lens: [num_seqs] int32: keys in the cache for each sequence, those of this step included.
        cu_seqlens_q: [num_seqs + 1] int32; the queries of sequence i are rows cu_seqlens_q[i] to cu_seqlens_q[i + 1]
            of q.
        max_seqlen_q: no sequence has more queries.
        scale: factor of the scores, usually head_dim ** -0.5.
        window: if not 0, a query sees its last `window` keys alone, its own included.
        softcap: if not 0, scores are softcap * tanh(scale * q k^T / softcap).
        return_lse: also give the logarithm of each query's sum of exponentials, with which partial results are merged.
        plan: from `plan_paged_attention` with the same lengths, shapes and window, written; CUDA makes one for this
            call if it is None. The CPU kernel needs none. With one of another window the result is NaN.

    Returns:
        [num_tokens, num_heads, head_dim], contiguous, dtype of q. A query that sees no key, and a row beyond the last
        sequence, is 0. With `return_lse` a pair: also [num_tokens, num_heads] float32, natural logarithm of the sum of
        exp(score) over the keys a query sees; -infinity where it sees none.

    Raises:
        RuntimeError: wrong device, dtype, shape, strides or options; from the CPU kernel and the reference also
            lengths that do not fit, and on the CPU a used block table entry that is not a block (on CUDA these are
            undefined behaviour: to look at them would stall the GPU).
    """
    out: Tensor
    lse: Tensor
    out, lse = _paged_attention(
        q, k_cache, v_cache, block_tables, seq_lens, cu_seqlens_q, max_seqlen_q,
        scale=scale, window=window, softcap=softcap, return_lse=return_lse, plan=plan,
    )  # fmt: skip
    return (out, lse) if return_lse else out
