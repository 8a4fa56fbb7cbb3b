"""Rows of an embedding table, or of one device's shard of it.

With the vocabulary cut over devices (Shoeybi et al. 2019, arXiv:1909.08053), each looks up the ids of its own shard and
gives zeros for the rest, and the sum over the devices is the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minivllm.ops._check import FLOATS, Check
from minivllm.ops._register import define


def _check_embedding(token_ids: Tensor, weight: Tensor) -> None:
    check = Check("embedding", weight.device)
    check.tensor("weight", weight, "vocab_shard hidden", FLOATS)
    check.tensor("token_ids", token_ids, "num_tokens", (torch.int64,))


def embedding_reference(token_ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    """The op's meaning in plain PyTorch; it never waits for the device."""
    _check_embedding(token_ids, weight)
    index = token_ids - vocab_start
    here = (token_ids >= vocab_start) & (index >= 0) & (index < weight.shape[0])  # a difference may wrap around
    if not weight.shape[0]:
        return weight.new_zeros(len(token_ids), weight.shape[1])
    rows = weight[index.masked_fill(~here, 0)]
    return rows.masked_fill(~here.unsqueeze(1), 0).contiguous()


def _embedding_fake(token_ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    _check_embedding(token_ids, weight)
    return weight.new_empty(token_ids.shape[0], weight.shape[1])


_embedding = define(
    "embedding",
    "(Tensor token_ids, Tensor weight, SymInt vocab_start=0) -> Tensor",
    embedding_reference,
    _embedding_fake,
)


def embedding(token_ids: Tensor, weight: Tensor, vocab_start: int = 0) -> Tensor:
    """Row i is weight[token_ids[i] - vocab_start], or zeros where that row does not exist.

    Args:
        token_ids: [num_tokens] int64, any values: a negative id, or one beyond the shard, gives zeros (never an error,
            so with the whole vocabulary in one table a wrong id goes unnoticed).
        weight: [vocab_shard, hidden] float32, bfloat16 or float16; rows may lie apart, last dimension contiguous.
        vocab_start: the id of the first row.

    Returns:
        [num_tokens, hidden], contiguous, dtype of weight.

    Raises:
        RuntimeError: wrong device, dtype, shape or strides.
    """
    out: Tensor = _embedding(token_ids, weight, vocab_start)
    return out
