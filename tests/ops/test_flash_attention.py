from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.flash_attention import flash_attention_reference
from tests.ops.attention_support import HEADS, Packed
from tests.ops.support import DEVICES, FLOAT_DTYPES, assert_close_to_exact


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", (False, True))
def test_matches_float64(device: str, dtype: torch.dtype, heads: tuple[int, int, int], causal: bool, seed: int) -> None:
    # One query, none, no keys, more queries than keys (the first see nothing), and borders of every tile.
    batch = Packed.random([1, 33, 0, 5, 3, 40], [1, 33, 4, 0, 131, 17], heads, seed, dtype, device)
    got, lse = batch.run_with_lse(causal)
    assert got.is_contiguous() and torch.equal(got, batch.run(causal))
    (exact, exact_lse), (reference, _) = batch.exact(causal), batch.reference(causal)
    assert_close_to_exact(got, exact, reference)
    unseen = got[34:39] if not causal else torch.cat((got[34:39], got[42 : 42 + 23]))
    assert unseen.count_nonzero() == 0  # of len_k 0; causal: the first 40 - 17 queries of the last sequence
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)  # -infinity equals itself


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("window", (0, 1, 7, 64, 100, 2**40))
@pytest.mark.parametrize("softcap", (0.0, 0.5, 30.0))
def test_window_and_softcap(device: str, dtype: torch.dtype, window: int, softcap: float, seed: int) -> None:
    options = {"window": window, "softcap": softcap}
    batch = Packed.random([150, 3, 20], [150, 700, 9], (4, 2, 64), seed, dtype, device, **options)
    batch = replace(batch, q=batch.q * 8)  # so that the cap bends
    got, lse = batch.run_with_lse()
    (exact, exact_lse), (reference, _) = batch.exact(), batch.reference()
    assert_close_to_exact(got, exact, reference)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_large_scores_do_not_overflow(device: str, dtype: torch.dtype, seed: int) -> None:
    batch = Packed.random([70], [70], (2, 1, 64), seed, dtype, device)
    batch = replace(batch, q=batch.q * 1e3, k=batch.k * 1e3)
    got = batch.run()
    assert torch.isfinite(got).all()
    # Scores near 1e7 differ by thousands: every query takes the value of its best key.
    rounding = 0 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), batch.exact()[0], rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("sizes", ((12.0, 0.1), (0.1, 12.0), (4.0, 3.0)))
def test_scores_that_grow_from_tile_to_tile(
    device: str, dtype: torch.dtype, head_dim: int, sizes: tuple[float, float], seed: int
) -> None:
    """Sums are rescaled at every tile, at none, and at some, in whichever direction a kernel walks."""
    batch = Packed.random([150], [900], (4, 2, head_dim), seed, dtype, device)
    factors = torch.linspace(*sizes, len(batch.k), device=device).view(-1, 1, 1)
    batch = replace(batch, k=(batch.k * factors).to(dtype))
    got, lse = batch.run_with_lse()
    (exact, exact_lse), (reference, _) = batch.exact(), batch.reference()
    assert_close_to_exact(got, exact, reference)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("keys", (1, 40, 2000))
def test_nan_is_never_hidden(device: str, dtype: torch.dtype, keys: int, seed: int) -> None:
    batch = Packed.random([1], [keys], (4, 2, 64), seed, dtype, device)
    assert replace(batch, q=batch.q * float("nan")).run().isnan().all()
    batch.k[keys // 2, 0, 5] = float("nan")  # key-value head 0 serves query heads 0 and 1
    got = batch.run()
    assert got[:, :2].isnan().all() and torch.isfinite(got[:, 2:]).all()


@pytest.mark.parametrize("device", DEVICES)
def test_no_sequences(device: str) -> None:
    got, lse = Packed.random([], [], (4, 2, 64), 0, torch.float32, device).run_with_lse()
    assert got.shape == (0, 4, 64) and lse.shape == (0, 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("head_dim", (1, 7, 32, 72, 96, 100, 160, 192, 250))
def test_head_dims_and_addresses(device: str, dtype: torch.dtype, head_dim: int, seed: int) -> None:
    """Any head_dim, and rows that begin at no round address."""
    batch = Packed.random([70, 9], [70, 90], (4, 2, head_dim), seed, dtype, device)
    exact, reference = batch.exact()[0], batch.reference()[0]
    for offset in (0, 1):
        views = []
        for x in (batch.q, batch.k, batch.v):
            wide = torch.full((len(x), x[0].numel() + 3), torch.nan, dtype=dtype, device=device)
            views.append(wide[:, offset : offset + x[0].numel()].unflatten(1, x.shape[1:]).copy_(x))
        moved = replace(batch, q=views[0], k=views[1], v=views[2])
        assert_close_to_exact(moved.run(), exact, reference)


LENGTHS = [1, 2, 3, 17, 31, 33, 63, 64, 65, 0, 127, 128, 129, 191, 255, 257, 511, 1023, 2049]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("group", (1, 2, 3, 4, 8, 16))
@pytest.mark.parametrize("head_dim", (64, 96, 128, 256))
@pytest.mark.parametrize("causal", (False, True))
def test_many_lengths(dtype: torch.dtype, group: int, head_dim: int, causal: bool, seed: int) -> None:
    """Tile borders in queries and keys; as many keys as queries, more, and fewer."""
    rng = random.Random(seed)
    lens_q = rng.sample(LENGTHS, len(LENGTHS))
    lens_k = [rng.choice((length, length + rng.randrange(300), rng.randrange(length + 1))) for length in lens_q]
    batch = Packed.random(lens_q, lens_k, (2 * group, 2, head_dim), seed, dtype, "cuda")
    got, lse = batch.run_with_lse(causal)
    (exact, exact_lse), (reference, _) = batch.exact(causal), batch.reference(causal)
    assert_close_to_exact(got, exact, reference)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("lengths", ((32767, 32767), (5, 131072), (1000, 20000)))
def test_long_sequences(dtype: torch.dtype, lengths: tuple[int, int], seed: int) -> None:
    batch = Packed.random([lengths[0]], [lengths[1]], (2, 1, 128), seed, dtype, "cuda")
    got, exact = batch.run(), batch.exact()[0]
    ends = slice(-64, None)  # the reference would store all scores: the last queries stand for all
    last = replace(batch, q=batch.q[ends], lens_q=[min(64, lengths[0])])
    assert_close_to_exact(got[ends], exact[ends], last.reference()[0])
    error, rounding = (got.double() - exact).norm(dim=-1), torch.finfo(dtype).eps * exact.norm(dim=-1)
    assert bool((error <= 3 * rounding + 1e-6).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_a_row_has_the_same_bits_alone_and_in_a_batch(dtype: torch.dtype, head_dim: int, seed: int) -> None:
    lens_q, lens_k = [300, 1, 77, 500], [300, 900, 400, 500]
    batch = Packed.random(lens_q, lens_k, (8, 2, head_dim), seed, dtype, "cuda")
    together = batch.run().split(lens_q)
    parts = zip(batch.q.split(lens_q), batch.k.split(lens_k), batch.v.split(lens_k), strict=True)
    for (q, k, v), expected in zip(parts, together, strict=True):
        alone = replace(batch, q=q, k=k, v=v, lens_q=[len(q)], lens_k=[len(k)])
        assert torch.equal(alone.run(), expected)
        assert torch.equal(replace(alone, q=q[-9:], lens_q=[len(q[-9:])]).run(), expected[-9:])


@pytest.mark.gpu
def test_a_thousand_sequences(seed: int) -> None:
    rng = random.Random(seed)
    lens = [rng.choice((0, 1, 2, 40)) for _ in range(1000)]
    batch = Packed.random(lens, lens, (4, 2, 64), seed, torch.bfloat16, "cuda")
    assert_close_to_exact(batch.run(), batch.exact()[0], batch.reference()[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_offsets_beyond_int32(dtype: torch.dtype, seed: int) -> None:
    batch = Packed.random([33], [33], (2, 2, 64), seed, dtype, "cuda")
    storage = torch.empty(2**31 + 2**17, dtype=dtype, device="cuda")  # 33 rows 2^26 elements apart

    def far(x: Tensor, offset: int) -> Tensor:
        return storage[offset:].as_strided((33, 2, 64), (2**26, 64, 1)).copy_(x)

    moved = replace(batch, q=far(batch.q, 0), k=far(batch.k, 1024), v=far(batch.v, 2048))
    assert torch.equal(moved.run(), batch.run())


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD_FLASH: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"window": -1}, r"window=-1, expected 0 \(off\)"),
    "window of all keys": ({"window": 4, "causal": False}, "window=4 needs causal=True"),
    "softcap": ({"softcap": float("nan")}, "softcap=nan, expected 0"),
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
def test_bad_input_of_flash_is_named(case: str, implementation: Callable[..., Any]) -> None:
    change, message = BAD_FLASH[case]
    arguments: dict[str, Any] = {name: torch.ones(4, 2, 8) for name in "qkv"}
    arguments |= {"cu_seqlens_q": ints(0, 4), "cu_seqlens_k": ints(0, 4), "max_seqlen_q": 4, "max_seqlen_k": 4}
    with pytest.raises(RuntimeError, match="minivllm::flash_attention: .*" + message):
        implementation(**(arguments | change), scale=1.0)
