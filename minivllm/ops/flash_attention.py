"""Exact attention over sequences that lie packed one after the other.

softmax(q k^T * scale) v with grouped queries: query head h reads key-value head h // (num_heads / num_kv_heads).
The matrix of scores is never stored: keys pass in tiles under an online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). Causal masks are aligned to the last query and key.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from minivllm.ops._attention import attend, check_heads, check_prefix_sums, check_scores, empty_lse
from minivllm.ops._check import FLOATS, Check
from minivllm.ops._register import define


def _check_flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    window: int,
    softcap: float,
) -> Check:
    check = Check("flash_attention", q.device)
    check.tensor("q", q, "total_q num_heads head_dim", FLOATS)
    check.tensor("k", k, "total_k num_kv_heads head_dim", (q.dtype,))
    check.tensor("v", v, "total_k num_kv_heads head_dim", (q.dtype,))
    check.tensor("cu_seqlens_q", cu_seqlens_q, "batch+1", (torch.int32,))
    check.tensor("cu_seqlens_k", cu_seqlens_k, "batch+1", (torch.int32,))
    check_heads(check)
    check_scores(check, window, softcap, causal)
    return check


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
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """The op's meaning in plain PyTorch, sequence by sequence. Reads the lengths on the host: one sync on CUDA."""
    check = _check_flash(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap)
    ends_q, ends_k = torch.stack((cu_seqlens_q, cu_seqlens_k)).tolist()
    check_prefix_sums(check, "q", ends_q, len(q), max_seqlen_q)
    check_prefix_sums(check, "k", ends_k, len(k), max_seqlen_k)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = empty_lse(q, return_lse).fill_(float("-inf"))
    for i in range(len(ends_q) - 1):
        rows, keys = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        if rows.start < rows.stop:
            out[rows], sums = attend(q[rows], k[keys], v[keys], scale, causal, window, softcap)
            if return_lse:
                lse[rows] = sums
    return out, lse


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
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    _check_flash(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, window, softcap)
    return q.new_empty(q.shape), empty_lse(q, return_lse)


_flash_attention = define(
    "flash_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, *, float scale, bool causal=True, int window=0, float softcap=0.0, bool return_lse=False) "
    "-> (Tensor, Tensor)",
    flash_attention_reference,
    _flash_fake,
)


@overload
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
    causal: bool = ...,
    window: int = ...,
    softcap: float = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
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
    causal: bool = ...,
    window: int = ...,
    softcap: float = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


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
    window: int = 0,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of sequences that lie one after the other in q, k and v.

    The arithmetic is float32; on CUDA bfloat16 and float16 enter the tensor cores, and weights are rounded to that
    dtype before they meet the values. A row's bits depend on its query and the keys and values it sees alone, not on
    other rows; on the CPU neither on the number of threads, and `paged_attention` gives the same bits. (A NaN or
    infinite value may spoil queries just before it, and with a window just after it.)

    Args:
        q: [total_q, num_heads, head_dim] float32, bfloat16 or float16; last dimension contiguous, any other strides.
            head_dim is 1 to 256 (64, 96, 128 and 256 are fastest); num_heads is a multiple of num_kv_heads.
        k: [total_k, num_kv_heads, head_dim], dtype of q; strides as q.
        v: like k.
        cu_seqlens_q: [batch + 1] int32; the queries of sequence i are rows cu_seqlens_q[i] to cu_seqlens_q[i + 1] of q.
        cu_seqlens_k: [batch + 1] int32, the same for k and v.
        max_seqlen_q: no sequence has more queries.
        max_seqlen_k: no sequence has more keys.
        scale: factor of the scores, usually head_dim ** -0.5.
        causal: query i of a sequence stands at position p = i + len_k - len_q and sees the keys j <= p; otherwise it
            sees all keys.
        window: if not 0, a query at position p sees its last `window` keys alone, p - window < j; needs `causal`
            (Beltagy et al. 2020, arXiv:2004.05150).
        softcap: if not 0, scores are softcap * tanh(scale * q k^T / softcap) (Gemma Team 2024, arXiv:2408.00118).
        return_lse: also give the logarithm of each query's sum of exponentials, with which partial results are merged.

    Returns:
        [total_q, num_heads, head_dim], contiguous, dtype of q. A query that sees no key, and a row beyond the last
        sequence, is 0. With `return_lse` a pair: also [total_q, num_heads] float32, natural logarithm of the sum of
        exp(score) over the keys a query sees; -infinity where it sees none.

    Raises:
        RuntimeError: wrong device, dtype, shape, strides or options; from the CPU kernel and the reference also
            lengths that do not fit (on CUDA such lengths are undefined behaviour: to look at them would stall the GPU).
    """
    out: Tensor
    lse: Tensor
    out, lse = _flash_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        scale=scale, causal=causal, window=window, softcap=softcap, return_lse=return_lse,
    )  # fmt: skip
    return (out, lse) if return_lse else out
