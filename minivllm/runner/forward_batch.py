"""All tensors of one step, complete at construction and passed as an argument to everything that computes.

Notation: T query tokens in all, R rows (requests), S rows that draw a token, B the most blocks a sequence can have.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What the model reads besides its weights and the KV cache; every tensor lies on the model's device.

    input_ids: [T] int64. positions: [T] int64, place of each token in its sequence. slot_mapping: [T] int64, place of
    each token's key and value in the cache (`minivllm.ops.store_kv`). block_tables: [R, B] int32. seq_lens: [R] int32,
    tokens of the sequence up to and including this step. cu_seqlens_q: [R + 1] int32, where each row's query tokens
    start.
    max_seqlen_q: the longest row. sample_indices: [S] int64, index in [0, T) of the last token of each row that draws
    one. attention_plan: how all layers share out the decode attention of these lengths
    (`minivllm.ops.plan_paged_attention`); None: each makes its own.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    sample_indices: Tensor
    attention_plan: Tensor | None = None


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How the S rows draw: slots [S] int64, temperature, top_p, min_p [S] float32, top_k [S] int32, seeds [S] int64
    (one fresh seed for each row and step)."""

    slots: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
