from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.store_kv import store_kv_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, generator, randn


def slots(num_tokens: int, num_slots: int, seed: int, device: str) -> Tensor:
    """Distinct slots in random order, about a fifth of the tokens skipped."""
    chosen = torch.randperm(num_slots, generator=generator(seed))[:num_tokens]
    skipped = torch.rand(num_tokens, generator=generator(seed + 1)) < 0.2
    return torch.where(skipped, -1 - chosen, chosen).to(device)


def expected(x: Tensor, cache: Tensor, slot_mapping: Tensor) -> Tensor:
    """The cache after the op, one token at a time."""
    cache, block_size = cache.clone(), cache.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot >= 0:
            cache[slot // block_size, :, slot % block_size] = x[token]
    return cache


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "block_size", "head_dim"), ((1, 8, 1), (2, 16, 64), (8, 16, 128), (3, 32, 80), (2, 256, 5))
)
@pytest.mark.parametrize("tokens", (0, 1, 41))
def test_writes_exactly_the_slots(
    device: str, dtype: torch.dtype, kv_heads: int, block_size: int, head_dim: int, tokens: int, seed: int
) -> None:
    packed = randn(tokens, 2 * kv_heads * head_dim + 3, seed=seed, dtype=dtype, device=device)
    k = packed[:, : kv_heads * head_dim].unflatten(-1, (kv_heads, head_dim))
    v = packed[:, kv_heads * head_dim : -3].unflatten(-1, (kv_heads, head_dim))
    k_cache, v_cache = (
        randn(7, kv_heads, block_size, head_dim, seed=seed + i, dtype=dtype, device=device) for i in (1, 2)
    )
    slot_mapping = slots(tokens, 7 * block_size, seed + 3, device)
    want_k, want_v = expected(k, k_cache, slot_mapping), expected(v, v_cache, slot_mapping)
    ops.store_kv(k, v, k_cache, v_cache, slot_mapping)
    assert torch.equal(k_cache, want_k) and torch.equal(v_cache, want_v)


@pytest.mark.parametrize("device", DEVICES)
def test_keys_and_values_in_one_allocation(device: str, seed: int) -> None:
    cache = randn(6, 2, 2, 16, 64, seed=seed, dtype=torch.float32, device=device)  # [block, k or v, head, offset, dim]
    k, v = (randn(20, 2, 64, seed=seed + i, dtype=torch.float32, device=device) for i in (1, 2))
    slot_mapping = slots(20, 96, seed + 3, device)
    want = torch.stack((expected(k, cache[:, 0], slot_mapping), expected(v, cache[:, 1], slot_mapping)), dim=1)
    ops.store_kv(k, v, cache[:, 0], cache[:, 1], slot_mapping)
    assert torch.equal(cache, want)


@pytest.mark.parametrize("device", DEVICES)
def test_all_tokens_skipped(device: str, seed: int) -> None:
    k, v = (randn(3, 2, 64, seed=seed + i, dtype=torch.float32, device=device) for i in (1, 2))
    k_cache, v_cache = (randn(2, 2, 16, 64, seed=seed + i, dtype=torch.float32, device=device) for i in (3, 4))
    before = k_cache.clone(), v_cache.clone()
    ops.store_kv(k, v, k_cache, v_cache, torch.tensor([-1, -7, -(2**62)], device=device))
    assert torch.equal(k_cache, before[0]) and torch.equal(v_cache, before[1])


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_int32(device: str) -> None:
    # Blocks 2^31 elements apart: the last of them is only reached with 64-bit offsets. Untouched pages cost no memory
    # on a CPU.
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    storage = torch.empty(2**31 + 8 * 8, dtype=torch.float16, device=device)
    cache = storage.as_strided((2, 1, 8, 8), (2**31, 64, 8, 1))
    other = torch.zeros(2, 1, 8, 8, dtype=torch.float16, device=device)
    k = torch.arange(8, dtype=torch.float16, device=device).view(1, 1, 8)
    ops.store_kv(k, k, cache, other, torch.tensor([8 + 3], device=device))
    assert torch.equal(storage[2**31 + 24 : 2**31 + 32], k.flatten())
    assert torch.equal(other[1, 0, 3], k.flatten()) and other[0].count_nonzero() == 0


def good_arguments(device: str) -> dict[str, Any]:
    return {
        "k": torch.ones(3, 2, 8, device=device),
        "v": torch.ones(3, 2, 8, device=device),
        "k_cache": torch.zeros(4, 2, 16, 8, device=device),
        "v_cache": torch.zeros(4, 2, 16, 8, device=device),
        "slot_mapping": torch.tensor([0, 1, 2], device=device),
    }


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_far_apart(device: str) -> None:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    storage = torch.empty(2**31 + 8 * 8, dtype=torch.float16, device=device)
    k = storage.as_strided((2, 1, 8), (2**31, 8, 1))
    k[1] = torch.arange(8)
    k_cache, v_cache = torch.zeros(2, 1, 1, 8, 8, dtype=torch.float16, device=device)
    ops.store_kv(k, k, k_cache, v_cache, torch.tensor([-1, 5], device=device))
    assert torch.equal(k_cache[0, 0, 5], k[1, 0]) and torch.equal(v_cache, k_cache)


BAD: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "k of int": ("k", lambda t: t.int(), "k has dtype"),
    "v of another shape": ("v", lambda t: t[:, :1], r"v has shape \[3, 1, 8\]"),
    "v strided": ("v", lambda t: t.new_ones(3, 8, 2).transpose(1, 2), "v must be contiguous in its last dimension"),
    "k_cache of another dtype": ("k_cache", lambda t: t.half(), "k_cache has dtype"),
    "v_cache of other heads": ("v_cache", lambda t: t[:, :1], r"v_cache has shape \[4, 1, 16, 8\]"),
    "v_cache of fewer blocks": ("v_cache", lambda t: t[:3], r"v_cache has shape \[3, 2, 16, 8\]"),
    "block_size 12": (
        "k_cache",
        lambda t: t.new_ones(4, 2, 12, 8),
        "k_cache has block_size=12, expected a power of two",
    ),
    "block_size 4": ("k_cache", lambda t: t.new_ones(4, 2, 4, 8), "k_cache has block_size=4, expected a power of two"),
    "heads last": ("k_cache", lambda t: t.new_ones(4, 16, 2, 8).transpose(1, 2), "expected each block"),
    "padded rows": ("k_cache", lambda t: t.new_ones(4, 2, 16, 9)[..., :8], "expected each block"),
    "int32 slots": ("slot_mapping", lambda t: t.int(), "slot_mapping has dtype"),
    "too many slots": (
        "slot_mapping",
        lambda t: t.new_zeros(4),
        r"slot_mapping has shape \[4\], expected \[num_tokens\]",
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(device: str, case: str) -> None:
    name, change, message = BAD[case]
    arguments = good_arguments(device)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=message):
        ops.store_kv(**arguments)


@pytest.mark.parametrize("bad", (64, 2**40))
@pytest.mark.parametrize("implementation", (ops.store_kv, store_kv_reference))
def test_a_slot_beyond_the_cache_is_an_error_and_writes_nothing(bad: int, implementation: Callable[..., None]) -> None:
    arguments = good_arguments("cpu")
    arguments["slot_mapping"] = torch.tensor([3, bad, 1])
    with pytest.raises(RuntimeError, match=rf"slot_mapping holds {bad}, expected less than 64"):
        implementation(**arguments)
    assert arguments["k_cache"].count_nonzero() == 0
