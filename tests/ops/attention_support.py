"""What the tests of flash_attention and paged_attention share: the formula in float64, and random arguments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.flash_attention import flash_attention_reference
from minivllm.ops.paged_attention import paged_attention_reference
from tests.ops.support import generator, randn

# (num_heads, num_kv_heads, head_dim)
HEADS = ((4, 2, 64), (16, 8, 128), (6, 6, 80), (8, 1, 256), (5, 1, 8), (3, 3, 24))

_SCORES_AT_ONCE = 1 << 25  # bounds the matrix of scores


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True, window: int = 0, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One sequence in float64, head by head: the formula and nothing else. Returns out and lse."""
    k, v = k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64, device=q.device)
    keys = torch.arange(len(k), device=q.device)
    step = max(1, _SCORES_AT_ONCE // max(1, len(k)))
    for head in range(q.shape[1]):
        for begin in range(0, len(q), step):
            rows = slice(begin, begin + step)
            scores = q[rows, head].double() @ k[:, head // group].T * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            position = torch.arange(len(q), device=q.device)[rows, None] + len(k) - len(q)
            if causal:
                hidden = keys > position
                if window:
                    hidden |= keys <= position - window
                scores[hidden] = float("-inf")
            lse[rows, head] = scores.logsumexp(-1)
            out[rows, head] = scores.softmax(-1).nan_to_num(0.0) @ v[:, head // group]
    return out, lse


def prefix_sums(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


@dataclass(frozen=True)
class Packed:
    """Arguments of flash_attention for random sequences; q, k and v are views of one packed tensor.

    `options` are window and softcap.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lens_q: list[int]
    lens_k: list[int]
    scale: float
    options: dict[str, Any]

    @staticmethod
    def random(
        lens_q: list[int],
        lens_k: list[int],
        heads: tuple[int, int, int],
        seed: int,
        dtype: torch.dtype,
        device: str,
        **options: Any,
    ) -> Packed:
        num_heads, num_kv_heads, head_dim = heads
        widths = [count * head_dim for count in (num_heads, num_kv_heads, num_kv_heads)]
        packed = randn(max(sum(lens_q), sum(lens_k)), sum(widths), seed=seed, dtype=dtype, device=device)
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in packed.split(widths, dim=-1))
        return Packed(q[: sum(lens_q)], k[: sum(lens_k)], v[: sum(lens_k)], lens_q, lens_k, head_dim**-0.5, options)

    def arguments(self) -> tuple[Any, ...]:
        device = str(self.q.device)
        cu_seqlens_q, cu_seqlens_k = prefix_sums(self.lens_q, device), prefix_sums(self.lens_k, device)
        longest_q, longest_k = max(self.lens_q, default=0), max(self.lens_k, default=0)
        return self.q, self.k, self.v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k

    def run(self, causal: bool = True) -> Tensor:
        return ops.flash_attention(*self.arguments(), scale=self.scale, causal=causal, **self.options)

    def run_with_lse(self, causal: bool = True) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"scale": self.scale, "causal": causal, **self.options}
        return ops.flash_attention(*self.arguments(), return_lse=True, **options)

    def reference(self, causal: bool = True) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"scale": self.scale, "causal": causal, **self.options}
        return flash_attention_reference(*self.arguments(), return_lse=True, **options)

    def exact(self, causal: bool = True) -> tuple[Tensor, Tensor]:
        parts = [x.split(lens) for x, lens in ((self.q, self.lens_q), (self.k, self.lens_k), (self.v, self.lens_k))]
        results = [exact_attention(*qkv, self.scale, causal, **self.options) for qkv in zip(*parts, strict=True)]
        return torch.cat([out for out, _ in results]), torch.cat([lse for _, lse in results])


@dataclass(frozen=True)
class Paged:
    """Arguments of paged_attention: every slot that no sequence uses is NaN, every unused table entry is garbage."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    longest: int
    scale: float
    options: dict[str, Any]

    @staticmethod
    def from_packed(packed: Packed, block_size: int, seed: int, padding_rows: int = 0) -> Paged:
        device, dtype = packed.q.device, packed.q.dtype
        needed = [-(-length // block_size) for length in packed.lens_k]
        num_blocks = sum(needed) + 3
        _, num_kv_heads, head_dim = packed.k.shape
        shape = (num_blocks, 2, num_kv_heads, block_size, head_dim)  # keys and values of a block in one allocation
        cache = torch.full(shape, float("nan"), dtype=dtype, device=device)
        free = torch.randperm(num_blocks, generator=generator(seed)).tolist()
        garbage = (2**31 - 1, -1, -(2**31), num_blocks)
        rows = []
        for i, (k, v) in enumerate(zip(packed.k.split(packed.lens_k), packed.v.split(packed.lens_k), strict=True)):
            blocks = [free.pop() for _ in range(needed[i])]
            slots = torch.arange(len(k), device=device)
            block = torch.tensor(blocks, dtype=torch.int64, device=device)[slots // block_size]
            for side, x in enumerate((k, v)):
                cache[block, side, :, slots % block_size] = x
            rows.append(blocks + [garbage[i % 4]] * (max(needed) + 2 - len(blocks)))
        padding = torch.full((padding_rows, *packed.q.shape[1:]), float("nan"), dtype=dtype, device=device)
        return Paged(
            torch.cat((packed.q, padding)) if padding_rows else packed.q,
            cache[:, 0],
            cache[:, 1],
            torch.tensor(rows, dtype=torch.int32, device=device),
            torch.tensor(packed.lens_k, dtype=torch.int32, device=device),
            prefix_sums(packed.lens_q, str(device)),
            max(packed.lens_q),
            packed.scale,
            packed.options,
        )

    def arguments(self) -> tuple[Any, ...]:
        lengths = (self.seq_lens, self.cu_seqlens_q, self.longest)
        return self.q, self.k_cache, self.v_cache, self.block_tables, *lengths

    def run(self) -> Tensor:
        return ops.paged_attention(*self.arguments(), scale=self.scale, **self.options)

    def run_with_lse(self) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"scale": self.scale, **self.options}
        return ops.paged_attention(*self.arguments(), return_lse=True, **options)

    def reference(self) -> tuple[Tensor, Tensor]:
        return paged_attention_reference(*self.arguments(), scale=self.scale, return_lse=True, **self.options)

    def of_sequence(self, i: int, begin: int, end: int) -> Paged:
        """Queries begin to end of sequence i alone, as if the later ones were not computed yet."""
        first, last = self.cu_seqlens_q[i : i + 2].tolist()
        shorter = self.seq_lens[i : i + 1] - (last - first - end)
        return replace(
            self,
            q=self.q[first + begin : first + end],
            block_tables=self.block_tables[i : i + 1],
            seq_lens=shorter,
            cu_seqlens_q=torch.tensor([0, end - begin], dtype=torch.int32, device=self.q.device),
            longest=end - begin,
        )
