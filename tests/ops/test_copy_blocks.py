from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.copy_blocks import copy_blocks_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, generator, randn


def pairs(count: int, num_blocks: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Any sources, distinct targets; with few blocks many are both."""
    sources = torch.randint(num_blocks, (count,), generator=generator(seed))
    targets = torch.randperm(num_blocks, generator=generator(seed + 1))[:count]
    return sources.to(device), targets.to(device)


def expected(cache: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """The cache after the op, one block at a time."""
    after = cache.clone()
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        after[target] = cache[source]
    return after


def caches(*shape: int, seed: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return (
        randn(*shape, seed=seed, dtype=dtype, device=device),
        randn(*shape, seed=seed + 1, dtype=dtype, device=device),
    )


def check(k_cache: Tensor, v_cache: Tensor, sources: Tensor, targets: Tensor) -> None:
    want = expected(k_cache, sources, targets), expected(v_cache, sources, targets)
    ops.copy_blocks(k_cache, v_cache, sources, targets)
    assert torch.equal(k_cache, want[0]) and torch.equal(v_cache, want[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "block_size", "head_dim"), ((1, 8, 1), (2, 16, 64), (8, 16, 128), (3, 32, 5), (1, 256, 80))
)
@pytest.mark.parametrize("count", (0, 1, 2, 11))
def test_random_pairs(
    device: str, dtype: torch.dtype, kv_heads: int, block_size: int, head_dim: int, count: int, seed: int
) -> None:
    k_cache, v_cache = caches(11, kv_heads, block_size, head_dim, seed=seed, dtype=dtype, device=device)
    check(k_cache, v_cache, *pairs(count, 11, seed + 2, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", (17, 32))
@pytest.mark.parametrize("count", (8, 33, 64, 65, 129, 512, 513, 1024, 1025, 1100))
def test_more_pairs_than_fit_a_buffer(device: str, head_dim: int, count: int, seed: int) -> None:
    k_cache, v_cache = caches(1200, 1, 8, head_dim, seed=seed, dtype=torch.float32, device=device)
    check(k_cache, v_cache, *pairs(count, 1200, seed + 2, device))


@pytest.mark.gpu
def test_more_bytes_than_fit_the_scratch_memory(seed: int) -> None:
    k_cache, v_cache = caches(3000, 4, 16, 128, seed=seed, dtype=torch.bfloat16, device="cuda")  # 48 MB a cache
    sources, targets = pairs(2900, 3000, seed + 2, "cuda")
    want = [cache.index_copy(0, targets, cache[sources]) for cache in (k_cache, v_cache)]
    ops.copy_blocks(k_cache, v_cache, sources, targets)
    assert torch.equal(k_cache, want[0]) and torch.equal(v_cache, want[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("sources", "targets"),
    (([0, 1], [1, 0]), ([0, 1, 2], [1, 2, 3]), ([1, 2, 3], [0, 1, 2]), ([2, 2, 2], [0, 2, 1]), ([3], [3])),
    ids=("swap", "chain up", "chain down", "one to many and itself", "itself"),
)
def test_all_sources_are_read_first(device: str, sources: list[int], targets: list[int], seed: int) -> None:
    k_cache, v_cache = caches(4, 8, 16, 128, seed=seed, dtype=torch.float32, device=device)  # several threads' work
    check(k_cache, v_cache, torch.tensor(sources, device=device), torch.tensor(targets, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_keys_and_values_in_one_allocation_with_gaps(device: str, seed: int) -> None:
    storage = randn(6, 3, 2, 16, 40, seed=seed, dtype=torch.float16, device=device)  # [block, k, v or gap, ...]
    sources, targets = pairs(5, 6, seed + 1, device)
    want = storage.clone()
    want[:, :2] = expected(storage[:, :2], sources, targets)
    ops.copy_blocks(storage[:, 0], storage[:, 1], sources, targets)
    assert torch.equal(storage, want)


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_int32(device: str) -> None:
    # Blocks 2^31 elements apart; untouched pages cost no memory on a CPU.
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    storage = torch.empty(2**31 + 8 * 8, dtype=torch.float16, device=device)
    cache = storage.as_strided((2, 1, 8, 8), (2**31, 64, 8, 1))
    other = torch.zeros(2, 1, 8, 8, dtype=torch.float16, device=device)
    cache[0], other[0] = torch.arange(64, device=device).view(8, 8), 7
    ops.copy_blocks(cache, other, torch.tensor([0], device=device), torch.tensor([1], device=device))
    assert torch.equal(storage[2**31 :], torch.arange(64, dtype=torch.float16, device=device)) and (other == 7).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ((0, 2, 16, 8), (3, 0, 16, 8)))
def test_nothing_to_copy(device: str, shape: tuple[int, ...]) -> None:
    k_cache, v_cache = torch.zeros(2, *shape, device=device)
    ids = torch.arange(min(shape[0], 2), device=device)
    ops.copy_blocks(k_cache, v_cache, ids, ids.flip(0))
    assert k_cache.count_nonzero() == 0


def good_arguments(device: str) -> dict[str, Any]:
    return {
        "k_cache": torch.zeros(4, 2, 16, 8, device=device),
        "v_cache": torch.zeros(4, 2, 16, 8, device=device),
        "sources": torch.tensor([0, 1], device=device),
        "targets": torch.tensor([2, 3], device=device),
    }


BAD: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "k_cache of int": ("k_cache", lambda t: t.int(), "k_cache has dtype"),
    "k_cache of three dimensions": ("k_cache", lambda t: t[0], r"k_cache has shape \[2, 16, 8\]"),
    "v_cache of another dtype": ("v_cache", lambda t: t.half(), "v_cache has dtype"),
    "v_cache of fewer blocks": ("v_cache", lambda t: t[:3], r"v_cache has shape \[3, 2, 16, 8\]"),
    "v_cache of other heads": ("v_cache", lambda t: t[:, :1], r"v_cache has shape \[4, 1, 16, 8\]"),
    "block_size 12": ("k_cache", lambda t: t[:, :, :12], "k_cache has block_size=12, expected a power of two"),
    "heads last": ("k_cache", lambda t: t.new_ones(4, 16, 2, 8).transpose(1, 2), "expected each block"),
    "padded rows": ("k_cache", lambda t: t.new_ones(4, 2, 16, 9)[..., :8], "expected each block"),
    "int32 sources": ("sources", lambda t: t.int(), "sources has dtype"),
    "sources of two dimensions": ("sources", lambda t: t[None], r"sources has shape \[1, 2\], expected \[n\]"),
    "strided sources": ("sources", lambda t: t.repeat(2)[::2], "sources must be contiguous"),
    "int32 targets": ("targets", lambda t: t.int(), "targets has dtype"),
    "more targets": ("targets", lambda t: t.repeat(2), r"targets has shape \[4\], expected \[n\] with .*n=2"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(device: str, case: str) -> None:
    name, change, message = BAD[case]
    arguments = good_arguments(device)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=f"minivllm::copy_blocks: .*{message}"):
        ops.copy_blocks(**arguments)


@pytest.mark.parametrize("name", ("sources", "targets"))
@pytest.mark.parametrize(
    ("bad", "wanted"), ((4, "less than 4"), (2**40, "less than 4"), (-1, "at least 0"), (-(2**63), "at least 0"))
)
@pytest.mark.parametrize("implementation", (ops.copy_blocks, copy_blocks_reference))
def test_an_id_out_of_range_is_an_error_and_writes_nothing(
    name: str, bad: int, wanted: str, implementation: Callable[..., None]
) -> None:
    arguments = good_arguments("cpu")
    arguments["k_cache"][:2], arguments["v_cache"][:2] = 1, 1
    arguments[name][1] = bad
    with pytest.raises(RuntimeError, match=f"minivllm::copy_blocks: {name} holds {bad}, expected {wanted}"):
        implementation(**arguments)
    assert arguments["k_cache"][2:].count_nonzero() == 0 and arguments["v_cache"][2:].count_nonzero() == 0
