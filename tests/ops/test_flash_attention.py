from __future__ import annotations

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
def test_large_scores_do_not_overflow(device: str, seed: int) -> None:
    batch = Packed.random([70], [70], (2, 1, 64), seed, torch.float32, device)
    batch = replace(batch, q=batch.q * 1e3, k=batch.k * 1e3)
    got = batch.run()
    assert torch.isfinite(got).all()
    # Scores near 1e7 differ by thousands: every query takes the value of its best key.
    torch.testing.assert_close(got.double(), batch.exact()[0], rtol=0, atol=1e-5)


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
    got, lse = Packed.random([], [], (4, 2, 64), 0, torch.float32, device).run_with_lse()
    assert got.shape == (0, 4, 64) and lse.shape == (0, 4)


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
