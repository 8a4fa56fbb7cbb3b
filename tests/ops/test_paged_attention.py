from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.paged_attention import paged_attention_reference
from tests.ops.attention_support import HEADS, Packed, Paged, exact_attention, prefix_sums
from tests.ops.support import DEVICES, FLOAT_DTYPES, assert_close_to_exact, randn


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("block_size", (8, 16, 32, 64, 128, 256))
def test_paged_matches_float64(
    device: str, dtype: torch.dtype, heads: tuple[int, int, int], block_size: int, seed: int
) -> None:
    borders = [max(1, n * block_size + off) for n in (1, 2) for off in (-1, 0, 1)]
    lens_k = [*borders[: 3 if block_size == 256 else 6], 1, 37, 0]
    lens_q = [1, min(3, lens_k[1]), *[1] * (len(lens_k) - 4), 37, 0]
    batch = Packed.random(lens_q, lens_k, heads, seed, dtype, device)
    paged = Paged.from_packed(batch, block_size, seed + 1, padding_rows=3)
    got, lse = paged.run_with_lse()
    assert got.is_contiguous() and got[-3:].count_nonzero() == 0 and bool((lse[-3:] == -torch.inf).all())
    (exact, exact_lse), (reference, _) = batch.exact(), paged.reference()
    assert_close_to_exact(got[:-3], exact, reference[:-3])
    torch.testing.assert_close(lse[:-3].double(), exact_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("window", (0, 1, 63, 600))
@pytest.mark.parametrize("softcap", (0.0, 20.0))
def test_window_and_softcap(device: str, dtype: torch.dtype, window: int, softcap: float, seed: int) -> None:
    options = {"window": window, "softcap": softcap}
    batch = Packed.random([1, 150, 3, 1], [2000, 150, 700, 1], (4, 2, 64), seed, dtype, device, **options)
    paged = Paged.from_packed(replace(batch, q=batch.q * 8), 16, seed + 1)
    got, lse = paged.run_with_lse()
    (exact, exact_lse), (reference, _) = replace(batch, q=batch.q * 8).exact(), paged.reference()
    assert_close_to_exact(got, exact, reference)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("context", (511, 512, 513, 1025, 5000))
def test_long_contexts_of_few_rows(device: str, dtype: torch.dtype, context: int, seed: int) -> None:
    """Borders of the key splits, with enough keys that the splits run on different threads."""
    batch = Packed.random([1, 2], [context, context - 1], (4, 2, 128), seed, dtype, device)
    paged = Paged.from_packed(batch, 16, seed + 1)
    assert_close_to_exact(paged.run(), batch.exact()[0], paged.reference()[0])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", ({}, {"window": 200}))
def test_a_row_has_the_same_bits_alone_in_chunks_and_in_a_batch(
    dtype: torch.dtype, heads: tuple[int, int, int], options: dict[str, Any], seed: int
) -> None:
    """The CPU kernels' promise: neither neighbours, chunks, blocks, threads nor packing change a bit."""
    if ops.build_info().kind == "reference":
        pytest.skip("a promise of the compiled kernels")
    length = 700
    batch = Packed.random([length, 1, 9], [length, 1300, 600], heads, seed, dtype, "cpu", **options)
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
def test_no_sequences(device: str) -> None:
    cache = torch.zeros(1, 2, 16, 64, device=device)
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    rows = torch.ones(2, 4, 64, device=device)
    arguments = rows, cache, cache, empty.view(0, 1), empty, prefix_sums([], device), 1
    got, lse = ops.paged_attention(*arguments, scale=1.0, return_lse=True)
    assert torch.equal(got, torch.zeros_like(rows)) and torch.equal(lse, torch.full((2, 4), -torch.inf, device=device))


def test_cache_offsets_beyond_int32(seed: int) -> None:
    # Two blocks 2^31 elements apart. Untouched pages cost no memory.
    storage = torch.empty(2**31 + 256, dtype=torch.float16)
    cache = storage.as_strided((2, 1, 8, 32), (2**31, 256, 32, 1))
    cache[1] = randn(1, 8, 32, seed=seed, dtype=torch.float16, device="cpu")
    q = randn(1, 1, 32, seed=seed + 1, dtype=torch.float16, device="cpu")
    table, lens = torch.tensor([[1]], dtype=torch.int32), torch.tensor([8], dtype=torch.int32)
    got = ops.paged_attention(q, cache, cache, table, lens, prefix_sums([1], "cpu"), 1, scale=0.2)
    rows = cache[1].transpose(0, 1)
    torch.testing.assert_close(got.double(), exact_attention(q, rows, rows, 0.2)[0], rtol=2e-3, atol=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("block_size", (8, 16, 32, 64, 128, 256))
@pytest.mark.parametrize("heads", ((8, 2, 64), (4, 4, 96), (16, 2, 128), (4, 1, 256), (6, 2, 72)))
def test_chunks_over_long_contexts(dtype: torch.dtype, block_size: int, heads: tuple[int, int, int], seed: int) -> None:
    rng = random.Random(seed)
    lens_q = [1, 2, 15, 64, 100, 200, 0, 129]
    lens_k = [length + rng.choice((0, 1, rng.randrange(2000))) for length in lens_q]
    lens_k[3] = 4 * block_size + rng.randrange(-1, 2) + 64  # ends at the border of a block, or beside it
    batch = Packed.random(lens_q, lens_k, heads, seed, dtype, "cuda")
    paged = Paged.from_packed(batch, block_size, seed + 1, padding_rows=70)
    got, lse = paged.run_with_lse()
    assert got[-70:].count_nonzero() == 0 and bool((lse[-70:] == -torch.inf).all())
    (exact, exact_lse), (reference, _) = batch.exact(), paged.reference()
    assert_close_to_exact(got[:-70], exact, reference[:-70])
    torch.testing.assert_close(lse[:-70].double(), exact_lse, rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("context", (131072, 100001))
def test_contexts_of_128k(dtype: torch.dtype, context: int, seed: int) -> None:
    batch = Packed.random([1, 70], [context, context - 7], (4, 1, 128), seed, dtype, "cuda")
    paged = Paged.from_packed(batch, 16, seed + 1)
    assert_close_to_exact(paged.run(), batch.exact()[0], paged.reference()[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_chunks_and_pages_change_no_bit_on_cuda(dtype: torch.dtype, head_dim: int, seed: int) -> None:
    """Where a prompt is cut into chunks of many queries, which blocks hold it, and who else is there."""
    batch = Packed.random([700, 90], [700, 400], (8, 2, head_dim), seed, dtype, "cuda", window=0)
    paged = Paged.from_packed(batch, 16, seed + 1)
    together = paged.run()
    assert torch.equal(together, batch.run())
    assert torch.equal(together, Paged.from_packed(batch, 256, seed + 2).run())
    for begin, end in ((0, 200), (63, 164), (200, 333), (333, 700)):
        assert torch.equal(paged.of_sequence(0, begin, end).run(), together[begin:end])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_cuda_cache_beyond_2_31_elements(dtype: torch.dtype, seed: int) -> None:
    batch = Packed.random([40], [200], (4, 2, 128), seed, dtype, "cuda")
    small = Paged.from_packed(batch, 16, seed + 1)
    used = small.block_tables[0, : -(-200 // 16)].long()
    num_blocks = (2**31 // (2 * 2 * 16 * 128)) + 20  # the last ones begin beyond 2^31 elements
    cache = torch.empty(num_blocks, 2, 2, 16, 128, dtype=dtype, device="cuda")
    last = num_blocks - 1 - torch.arange(len(used), device="cuda")
    cache[last, 0], cache[last, 1] = small.k_cache[used], small.v_cache[used]
    table = last.to(torch.int32).unsqueeze(0)
    large = replace(small, k_cache=cache[:, 0], v_cache=cache[:, 1], block_tables=table)
    assert torch.equal(large.run(), small.run())


@pytest.mark.gpu
def test_cuda_graph_replays_on_other_lengths(seed: int) -> None:
    """A captured call serves any lengths with these totals: more, fewer and no queries, other tables."""
    makes = [
        ([64, 64, 64], [200, 64, 90]),
        ([1, 1, 1], [150, 20, 3]),
        ([0, 128, 3], [0, 200, 3]),
        ([0, 0, 0], [9, 9, 9]),
    ]
    batches = []
    for i, (lens_q, lens_k) in enumerate(makes):
        packed = Packed.random(lens_q, lens_k, (8, 2, 128), seed + i, torch.bfloat16, "cuda")
        batches.append((packed, Paged.from_packed(packed, 16, seed, padding_rows=192 - sum(lens_q))))
    blocks, columns = (max(paged.k_cache.shape[0] for _, paged in batches), 16)
    static = replace(
        batches[0][1],
        k_cache=torch.zeros(blocks, 2, 16, 128, dtype=torch.bfloat16, device="cuda"),
        v_cache=torch.zeros(blocks, 2, 16, 128, dtype=torch.bfloat16, device="cuda"),
        block_tables=torch.zeros(3, columns, dtype=torch.int32, device="cuda"),
        longest=192,
    )

    def fill(paged: Paged) -> None:
        for name in ("q", "seq_lens", "cu_seqlens_q"):
            getattr(static, name).copy_(getattr(paged, name))
        for name in ("k_cache", "v_cache"):
            getattr(static, name)[: len(paged.k_cache)] = getattr(paged, name)
        static.block_tables[:, : paged.block_tables.shape[1]] = paged.block_tables

    fill(batches[0][1])
    static.run()  # loads the kernel before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = static.run_with_lse()
    for packed, paged in batches:
        fill(paged)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        live = sum(packed.lens_q)
        assert out[live:].count_nonzero() == 0 and bool((lse[live:] == -torch.inf).all())
        if live:
            assert_close_to_exact(out[:live], packed.exact()[0], packed.reference()[0])


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_PAGED: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"window": -1}, r"window=-1, expected 0 \(off\)"),
    "softcap": ({"softcap": -2.0}, "softcap=-2.0+, expected 0"),
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
def test_bad_input_of_paged_is_named(case: str, implementation: Callable[..., Any]) -> None:
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
