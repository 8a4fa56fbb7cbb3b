from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.attention import flash_attention_reference, paged_attention_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, assert_close_to_exact, generator, randn

# (num_heads, num_kv_heads, head_dim)
HEADS = ((4, 2, 64), (16, 8, 128), (6, 6, 80), (8, 1, 256), (5, 1, 8), (3, 3, 24))


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = True) -> Tensor:
    """One sequence in float64, head by head: the formula and nothing else."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        for i in range(len(q)):
            seen = max(0, min(len(k), i + 1 + len(k) - len(q))) if causal else len(k)
            if seen:
                scores = k[:seen, head // group] @ q[i, head] * scale
                out[i, head] = torch.softmax(scores, 0) @ v[:seen, head // group]
    return out


def prefix_sums(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


@dataclass(frozen=True)
class Packed:
    """Arguments of flash_attention for random sequences; q, k and v are views of one packed tensor."""

    q: Tensor
    k: Tensor
    v: Tensor
    lens_q: list[int]
    lens_k: list[int]
    scale: float

    @staticmethod
    def random(
        lens_q: list[int], lens_k: list[int], heads: tuple[int, int, int], seed: int, dtype: torch.dtype, device: str
    ) -> Packed:
        num_heads, num_kv_heads, head_dim = heads
        widths = [count * head_dim for count in (num_heads, num_kv_heads, num_kv_heads)]
        packed = randn(max(sum(lens_q), sum(lens_k)), sum(widths), seed=seed, dtype=dtype, device=device)
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in packed.split(widths, dim=-1))
        return Packed(q[: sum(lens_q)], k[: sum(lens_k)], v[: sum(lens_k)], lens_q, lens_k, head_dim**-0.5)

    def arguments(self) -> tuple[Any, ...]:
        device = str(self.q.device)
        cu_seqlens_q, cu_seqlens_k = prefix_sums(self.lens_q, device), prefix_sums(self.lens_k, device)
        longest_q, longest_k = max(self.lens_q, default=0), max(self.lens_k, default=0)
        return self.q, self.k, self.v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k

    def run(self, causal: bool = True) -> Tensor:
        return ops.flash_attention(*self.arguments(), scale=self.scale, causal=causal)

    def reference(self, causal: bool = True) -> Tensor:
        return flash_attention_reference(*self.arguments(), scale=self.scale, causal=causal)

    def exact(self, causal: bool = True) -> Tensor:
        parts = [x.split(lens) for x, lens in ((self.q, self.lens_q), (self.k, self.lens_k), (self.v, self.lens_k))]
        return torch.cat([exact_attention(q, k, v, self.scale, causal) for q, k, v in zip(*parts, strict=True)])


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
            for j, block in enumerate(blocks):
                span = slice(j * block_size, (j + 1) * block_size)
                for side, x in enumerate((k[span], v[span])):
                    cache[block, side, :, : len(x)] = x.transpose(0, 1)
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
        )

    def arguments(self) -> tuple[Any, ...]:
        lengths = (self.seq_lens, self.cu_seqlens_q, self.longest)
        return self.q, self.k_cache, self.v_cache, self.block_tables, *lengths

    def run(self) -> Tensor:
        return ops.paged_attention(*self.arguments(), scale=self.scale)

    def reference(self) -> Tensor:
        return paged_attention_reference(*self.arguments(), scale=self.scale)

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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", (False, True))
def test_flash_matches_float64(
    device: str, dtype: torch.dtype, heads: tuple[int, int, int], causal: bool, seed: int
) -> None:
    # One query, none, no keys, more queries than keys (the first see nothing), and borders of every tile.
    batch = Packed.random([1, 33, 0, 5, 3, 40], [1, 33, 4, 0, 131, 17], heads, seed, dtype, device)
    got = batch.run(causal)
    assert got.is_contiguous()
    assert_close_to_exact(got, batch.exact(causal), batch.reference(causal))
    unseen = got[34:39] if not causal else torch.cat((got[34:39], got[42 : 42 + 23]))
    assert unseen.count_nonzero() == 0  # of len_k 0; causal: the first 40 - 17 queries of the last sequence


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("block_size", (8, 16, 256))
def test_paged_matches_float64(
    device: str, dtype: torch.dtype, heads: tuple[int, int, int], block_size: int, seed: int
) -> None:
    borders = [max(1, n * block_size + off) for n in (1, 2) for off in (-1, 0, 1)]
    lens_k = [*borders[: 3 if block_size == 256 else 6], 1, 37, 0]
    lens_q = [1, min(3, lens_k[1]), *[1] * (len(lens_k) - 4), 37, 0]
    batch = Packed.random(lens_q, lens_k, heads, seed, dtype, device)
    paged = Paged.from_packed(batch, block_size, seed + 1, padding_rows=3)
    got = paged.run()
    assert got.is_contiguous() and got[-3:].count_nonzero() == 0
    assert_close_to_exact(got[:-3], batch.exact(), paged.reference()[:-3])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("context", (511, 512, 513, 1025, 5000))
def test_long_contexts_of_few_rows(device: str, dtype: torch.dtype, context: int, seed: int) -> None:
    """Borders of the key splits, with enough keys that the splits run on different threads."""
    batch = Packed.random([1, 2], [context, context - 1], (4, 2, 128), seed, dtype, device)
    paged = Paged.from_packed(batch, 16, seed + 1)
    assert_close_to_exact(paged.run(), batch.exact(), paged.reference())


@pytest.mark.parametrize("device", DEVICES)
def test_large_scores_do_not_overflow(device: str, seed: int) -> None:
    batch = Packed.random([70], [70], (2, 1, 64), seed, torch.float32, device)
    batch = replace(batch, q=batch.q * 1e3, k=batch.k * 1e3)
    got = batch.run()
    assert torch.isfinite(got).all()
    # Scores near 1e7 differ by thousands: every query takes the value of its best key.
    torch.testing.assert_close(got.double(), batch.exact(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("heads", HEADS)
def test_a_row_has_the_same_bits_alone_in_chunks_and_in_a_batch(
    dtype: torch.dtype, heads: tuple[int, int, int], seed: int
) -> None:
    """The CPU kernels' promise: neither neighbours, chunks, blocks, threads nor packing change a bit."""
    if ops.build_info().kind == "reference":
        pytest.skip("a promise of the compiled kernels")
    length = 700
    batch = Packed.random([length, 1, 9], [length, 1300, 600], heads, seed, dtype, "cpu")
    paged = Paged.from_packed(batch, 16, seed + 1)
    together = paged.run()
    assert torch.equal(together, batch.run())
    assert torch.equal(together, Paged.from_packed(batch, 64, seed + 2).run())
    for begin, end in ((0, 1), (0, 63), (63, 64), (64, 65), (65, 512), (512, 513), (513, 699), (699, 700)):
        assert torch.equal(paged.of_sequence(0, begin, end).run(), together[begin:end])
    assert torch.equal(paged.of_sequence(1, 0, 1).run(), together[length : length + 1])
    assert torch.equal(paged.of_sequence(2, 4, 9).run(), together[length + 5 :])


@pytest.mark.parametrize("device", DEVICES)
def test_other_sequences_may_hold_nan(device: str, seed: int) -> None:
    batch = Packed.random([4, 5, 1], [20, 5, 33], (4, 2, 64), seed, torch.float32, device)
    paged = Paged.from_packed(batch, 8, seed + 1)
    clean = paged.run()
    paged.k_cache[int(paged.block_tables[1, 0])] = float("nan")  # the only block of sequence 1
    dirty = paged.run()
    assert dirty[4:9].isnan().all()
    assert torch.equal(dirty[:4], clean[:4]) and torch.equal(dirty[9:], clean[9:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keys", (1, 40, 2000))
def test_nan_is_never_hidden(device: str, keys: int, seed: int) -> None:
    batch = Packed.random([1], [keys], (4, 2, 64), seed, torch.float32, device)
    assert replace(batch, q=batch.q * float("nan")).run().isnan().all()
    batch.k[keys // 2, 0, 5] = float("nan")  # key-value head 0 serves query heads 0 and 1
    got = batch.run()
    assert got[:, :2].isnan().all() and torch.isfinite(got[:, 2:]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_sequences(device: str) -> None:
    batch = Packed.random([], [], (4, 2, 64), 0, torch.float32, device)
    assert batch.run().shape == (0, 4, 64)
    cache = torch.zeros(1, 2, 16, 64, device=device)
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    rows = torch.ones(2, 4, 64, device=device)
    got = ops.paged_attention(rows, cache, cache, empty.view(0, 1), empty, prefix_sums([], device), 1, scale=1.0)
    assert torch.equal(got, torch.zeros_like(rows))


def test_cache_offsets_beyond_int32(seed: int) -> None:
    # Two blocks 2^31 elements apart. Untouched pages cost no memory.
    storage = torch.empty(2**31 + 256, dtype=torch.float16)
    cache = storage.as_strided((2, 1, 8, 32), (2**31, 256, 32, 1))
    cache[1] = randn(1, 8, 32, seed=seed, dtype=torch.float16, device="cpu")
    q = randn(1, 1, 32, seed=seed + 1, dtype=torch.float16, device="cpu")
    table, lens = torch.tensor([[1]], dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
    got = ops.paged_attention(q, cache, cache, table, lens, prefix_sums([1], "cpu"), 1, scale=0.2)
    rows = cache[1].transpose(0, 1)
    torch.testing.assert_close(got.double(), exact_attention(q, rows, rows, 0.2), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_opcheck(device: str, dtype: torch.dtype, seed: int) -> None:
    batch = Packed.random([3, 1], [5, 9], (4, 2, 16), seed, dtype, device)
    flash, paged = torch.ops.minivllm.flash_attention.default, torch.ops.minivllm.paged_attention.default
    torch.library.opcheck(flash, batch.arguments(), {"scale": 0.25, "causal": True})
    cache = Paged.from_packed(batch, 8, seed + 1)
    torch.library.opcheck(paged, cache.arguments(), {"scale": 0.25})


@pytest.mark.parametrize("device", DEVICES)
def test_composes_with_torch_compile(device: str, seed: int) -> None:
    batch = Packed.random([3, 1], [5, 9], (4, 2, 16), seed, torch.float32, device)
    paged = Paged.from_packed(batch, 8, seed + 1)
    q, *flash = batch.arguments()
    _, *rest = paged.arguments()

    def block(q: Tensor) -> Tensor:
        packed = ops.flash_attention(q * 2, *flash, scale=0.25)
        return packed + ops.paged_attention(q + 1, *rest, scale=0.25) * 3

    assert isinstance(q, Tensor)
    torch.testing.assert_close(torch.compile(block, fullgraph=True)(q), block(q))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_FLASH: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"q": torch.ones(4, 3, 8)}, "num_heads=3 is not a multiple of num_kv_heads=2"),
    "head_dim": ({name: torch.ones(4, 2, 264) for name in "qkv"}, "head_dim=264, expected 1 to 256"),
    "dtype of v": ({"v": torch.ones(4, 2, 8).half()}, "v has dtype"),
    "shape of v": (
        {"v": torch.ones(3, 2, 8)},
        r"v has shape \[3, 2, 8\], expected \[total_k, num_kv_heads, head_dim\]",
    ),
    "strides of k": ({"k": torch.ones(4, 8, 2).transpose(1, 2)}, "k must be contiguous in its last dimension"),
    "int64 lengths": ({"cu_seqlens_q": torch.tensor([0, 4])}, "cu_seqlens_q has dtype"),
    "two batches": ({"cu_seqlens_k": ints(0, 2, 4)}, r"cu_seqlens_k has shape \[3\], expected \[batch\+1\]"),
    "no lengths": ({"cu_seqlens_q": ints(), "cu_seqlens_k": ints()}, "cu_seqlens_q is empty"),
    "not from 0": ({"cu_seqlens_q": ints(1, 4)}, "cu_seqlens_q begins with 1, expected 0"),
    "negative": (
        {"cu_seqlens_k": ints(0, -4)},
        "cu_seqlens_k gives sequence 0 a length of -4, expected 0 to max_seqlen_k=4",
    ),
    "too long": ({"max_seqlen_q": 3}, "cu_seqlens_q gives sequence 0 a length of 4, expected 0 to max_seqlen_q=3"),
    "past the end": (
        {"cu_seqlens_k": ints(0, 5), "max_seqlen_k": 9},
        "cu_seqlens_k ends with 5, but there are only 4 rows",
    ),
}


@pytest.mark.parametrize("implementation", (ops.flash_attention, flash_attention_reference))
@pytest.mark.parametrize("case", BAD_FLASH)
def test_bad_input_of_flash_is_named(case: str, implementation: Callable[..., Tensor]) -> None:
    change, message = BAD_FLASH[case]
    arguments: dict[str, Any] = {name: torch.ones(4, 2, 8) for name in "qkv"}
    arguments |= {"cu_seqlens_q": ints(0, 4), "cu_seqlens_k": ints(0, 4), "max_seqlen_q": 4, "max_seqlen_k": 4}
    with pytest.raises(RuntimeError, match="minivllm::flash_attention: .*" + message):
        implementation(**(arguments | change), scale=1.0)


BAD_PAGED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"q": torch.ones(3, 3, 8)}, "num_heads=3 is not a multiple of num_kv_heads=2"),
    "dtype of cache": ({"v_cache": torch.ones(4, 2, 16, 8).half()}, "v_cache has dtype"),
    "block_size": ({name: torch.ones(4, 2, 12, 8) for name in ("k_cache", "v_cache")}, "k_cache has block_size=12"),
    "tokens before heads": ({"k_cache": torch.ones(4, 16, 2, 8).transpose(1, 2)}, "k_cache has strides"),
    "int64 table": ({"block_tables": torch.tensor([[0, 1], [2, 3]])}, "block_tables has dtype"),
    "lengths of three": ({"seq_lens": ints(1, 2, 3)}, r"seq_lens has shape \[3\], expected \[num_seqs\]"),
    "batch of one": ({"cu_seqlens_q": ints(0, 3)}, r"cu_seqlens_q has 2 numbers, expected num_seqs \+ 1 = 3"),
    "too many queries": (
        {"cu_seqlens_q": ints(0, 1, 4), "max_seqlen_q": 3},
        "cu_seqlens_q ends with 4, but there are only 3",
    ),
    "too long": ({"seq_lens": ints(33, 5)}, r"seq_lens\[0\] is 33, expected 0 to 32"),
    "negative length": ({"seq_lens": ints(3, -1)}, r"seq_lens\[1\] is -1, expected 0 to 32"),
    "block too large": ({"block_tables": ints(0, 4, 1, 2).view(2, 2)}, r"block_tables\[0\]\[1\] is 4, expected 0 to 3"),
    "negative block": (
        {"block_tables": ints(0, 1, -1, 2).view(2, 2)},
        r"block_tables\[1\]\[0\] is -1, expected 0 to 3",
    ),
}


@pytest.mark.parametrize("implementation", (ops.paged_attention, paged_attention_reference))
@pytest.mark.parametrize("case", BAD_PAGED)
def test_bad_input_of_paged_is_named(case: str, implementation: Callable[..., Tensor]) -> None:
    change, message = BAD_PAGED[case]
    arguments: dict[str, Any] = {
        "q": torch.ones(3, 2, 8),
        "k_cache": torch.ones(4, 2, 16, 8),
        "v_cache": torch.ones(4, 2, 16, 8),
        "block_tables": ints(0, 1, 2, 99).view(2, 2),
        "seq_lens": ints(32, 5),
        "cu_seqlens_q": ints(0, 1, 3),
        "max_seqlen_q": 2,
    }
    with pytest.raises(RuntimeError, match="minivllm::paged_attention: .*" + message):
        implementation(**(arguments | change), scale=1.0)
