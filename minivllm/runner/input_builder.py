"""Turns a `Batch` into tensors: keeps one row of state for each slot, applies the step's deltas, and lays out the
columns.

The host keeps numpy mirrors of the block tables and sampling state, computes every index column with a few vector
operations, and sends them to the device as one int64 and one float32 array. Last tokens live on the device alone, so a
decode row needs nothing that the host would have to wait for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minivllm.batch import Batch
from minivllm.runner.columns import IntArray, ints, upload
from minivllm.runner.forward_batch import ForwardBatch, SamplingBatch

# Odd, so that positions map to distinct seeds: 2^64 divided by the golden ratio, as a signed number.
_SEED_STEP = np.int64(-7046029254386353131)


class InputBuilder:
    """Rows of state for `max_num_seqs` slots; a sequence has at most `max_blocks` blocks."""

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self._block_shift = block_size.bit_length() - 1  # block sizes are powers of two
        self.device = device
        self._block_tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._device_tables = torch.from_numpy(self._block_tables)
        if device.type != "cpu":
            self._device_tables = self._device_tables.to(device)
        self._temperature, self._top_p, self._min_p = (np.zeros(max_num_seqs, dtype=np.float32) for _ in range(3))
        self._top_k, self._seeds = (np.zeros(max_num_seqs, dtype=np.int64) for _ in range(2))
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)

    def build(self, batch: Batch) -> tuple[ForwardBatch, SamplingBatch | None]:
        """The step's tensors; no SamplingBatch when no row draws a token."""
        self._apply_deltas(batch)
        slots, starts, lengths = ints(batch.slots), ints(batch.starts), ints(batch.lengths)
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        blocks = self._block_tables[np.repeat(slots, lengths), positions >> self._block_shift]
        slot_mapping = (blocks.astype(np.int64) << self._block_shift) + (positions & (self.block_size - 1))
        samples = ints(batch.samples)
        seq_lens = starts + lengths
        num_decodes = batch.token_counts.count(0)
        columns = [
            positions, slot_mapping, seq_lens, offsets, slots, ints(batch.token_ids), offsets[1:][samples] - 1,
        ]  # fmt: skip
        positions_, slot_mapping_, seq_lens_, offsets_, slots_, tokens_, sample_indices_ = upload(columns, self.device)
        fwd = ForwardBatch(
            input_ids=self._query_tokens(slots_[:num_decodes], tokens_),
            positions=positions_,
            slot_mapping=slot_mapping_,
            block_tables=self._device_tables.index_select(0, slots_),
            seq_lens=seq_lens_.int(),
            cu_seqlens_q=offsets_.int(),
            max_seqlen_q=max(batch.lengths),
            sample_indices=sample_indices_,
        )
        return fwd, self._sampling(slots[samples], seq_lens[samples]) if batch.samples else None

    def keep_last_tokens(self, slots: Tensor, token_ids: Tensor) -> None:
        """Remember the drawn ids [S] as the next query tokens of `slots` [S]."""
        self._last_tokens.index_copy_(0, slots, token_ids)

    def _query_tokens(self, decode_slots: Tensor, prompt_tokens: Tensor) -> Tensor:
        """[T] ids: the last token of each decode row, then the prompt tokens of this step."""
        if not len(decode_slots):
            return prompt_tokens
        last = self._last_tokens.index_select(0, decode_slots)
        return torch.cat((last, prompt_tokens)) if len(prompt_tokens) else last

    def _apply_deltas(self, batch: Batch) -> None:
        for slot, temperature, top_k, top_p, min_p, seed in batch.new_slots:
            self._temperature[slot], self._top_p[slot], self._min_p[slot] = temperature, top_p, min_p
            self._top_k[slot], self._seeds[slot] = top_k, seed
        if not batch.block_slots:
            return
        entry = (ints(batch.block_slots), ints(batch.block_indices))
        self._block_tables[entry] = batch.block_ids  # of entries of the same place the last one stays
        if self.device.type != "cpu":  # on the CPU the mirror and the table are the same memory
            # Read back, so that entries of the same place say the same: a GPU writes them in any order.
            slots, indices, ids = upload([*entry, self._block_tables[entry].astype(np.int64)], self.device)
            self._device_tables[slots, indices] = ids.int()

    def _sampling(self, slots: IntArray, lengths: IntArray) -> SamplingBatch:
        # A draw is a function of the request's seed and the length of its sequence, never of the batch around it.
        seeds = self._seeds[slots] + lengths * _SEED_STEP
        slots_, top_k, seeds_ = upload([slots, self._top_k[slots], seeds], self.device)
        floats = np.stack((self._temperature[slots], self._top_p[slots], self._min_p[slots]))
        temperature, top_p, min_p = torch.from_numpy(floats).to(self.device, non_blocking=True)
        return SamplingBatch(slots_, temperature, top_k.int(), top_p, min_p, seeds_)
