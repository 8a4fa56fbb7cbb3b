from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.swap_blocks import swap_blocks_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, generator, no_device_sync, randn

# Where source and target lie; "pinned" is host memory.
PLACES = (
    ("cpu", "cpu"),
    *(
        pytest.param(source, target, marks=pytest.mark.gpu)
        for source, target in (("cuda", "cuda"), ("cuda", "pinned"), ("pinned", "cuda"))
    ),
)


def place(x: Tensor, where: str) -> Tensor:
    return x.cpu().pin_memory() if where == "pinned" else x.to(where)


def random_ids(count: int, num_sources: int, num_targets: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Any sources, distinct targets."""
    sources = torch.randint(num_sources, (count,), generator=generator(seed))
    targets = torch.randperm(num_targets, generator=generator(seed + 1))[:count]
    return sources.to(device), targets.to(device)


def check(source: Tensor, target: Tensor, source_ids: Tensor, target_ids: Tensor) -> None:
    before = source.clone()
    want = target.cpu()  # a copy, unless it is there already
    want = want.clone().index_copy_(0, target_ids.cpu(), source.cpu()[source_ids.cpu()])
    ops.swap_blocks(source, target, source_ids, target_ids)
    if source_ids.is_cuda:
        torch.cuda.synchronize()
    assert torch.equal(target.cpu(), want) and torch.equal(source, before)


@pytest.mark.parametrize(("source", "target"), PLACES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "block_size", "head_dim"), ((1, 8, 1), (2, 16, 64), (8, 16, 128), (3, 32, 5), (1, 256, 80))
)
@pytest.mark.parametrize("count", (0, 1, 13))
def test_random_blocks(
    source: str, target: str, dtype: torch.dtype, kv_heads: int, block_size: int, head_dim: int, count: int, seed: int
) -> None:
    shape = kv_heads, block_size, head_dim
    a = place(randn(7, *shape, seed=seed, dtype=dtype, device="cpu"), source)
    b = place(randn(20, *shape, seed=seed + 1, dtype=dtype, device="cpu"), target)
    ids = random_ids(count, 7, 20, seed + 2, "cuda" if "cuda" in (source, target) else "cpu")
    check(a, b, *ids)


@pytest.mark.parametrize(("source", "target"), PLACES)
def test_keys_of_one_allocation_with_gaps(source: str, target: str, seed: int) -> None:
    shape = (6, 3, 2, 16, 40)  # [block, k, v or gap, ...]
    a = place(randn(*shape, seed=seed, dtype=torch.float16, device="cpu"), source)
    b = place(randn(*shape, seed=seed + 1, dtype=torch.float16, device="cpu"), target)
    rest = b[:, 1:].clone()
    check(a[:, 1], b[:, 0], *random_ids(5, 6, 6, seed + 2, "cuda" if "cuda" in (source, target) else "cpu"))
    assert torch.equal(b[:, 1:], rest)


@pytest.mark.parametrize(("source", "target"), PLACES)
def test_offsets_beyond_int32(source: str, target: str) -> None:
    if source == "pinned":
        pytest.skip("would pin 4 GiB of host memory")
    if source == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=source)  # untouched pages cost no memory on a CPU
    far = storage.as_strided((2, 1, 8, 8), (2**31, 64, 8, 1))
    far.copy_(torch.arange(128, dtype=torch.float16).view(2, 1, 8, 8))
    near = place(torch.zeros(3, 1, 8, 8, dtype=torch.float16), target)
    one, two = (torch.tensor([i], device=source) for i in (1, 2))
    check(far, near, one, two)


@pytest.mark.parametrize("name", ("source_ids", "target_ids"))
@pytest.mark.parametrize(("bad", "wanted"), ((4, "less than 4"), (2**40, "less than 4"), (-1, "at least 0")))
@pytest.mark.parametrize("implementation", (ops.swap_blocks, swap_blocks_reference))
def test_an_id_out_of_range_is_an_error_and_writes_nothing(
    name: str, bad: int, wanted: str, implementation: Callable[..., None]
) -> None:
    source, target = torch.ones(4, 1, 8, 2), torch.zeros(4, 1, 8, 2)
    ids = {"source_ids": torch.tensor([0, 1]), "target_ids": torch.tensor([2, 3])}
    ids[name][1] = bad
    with pytest.raises(RuntimeError, match=f"minivllm::swap_blocks: {name} holds {bad}, expected {wanted}"):
        implementation(source, target, **ids)
    assert target.count_nonzero() == 0


BAD: dict[str, tuple[Callable[[], tuple[Tensor, Tensor]], str]] = {
    "other heads": (lambda: (torch.ones(4, 2, 8, 2), torch.ones(4, 1, 8, 2)), r"target has shape \[4, 1, 8, 2\]"),
    "other block size": (lambda: (torch.ones(4, 1, 8, 2), torch.ones(4, 1, 16, 2)), "target has shape"),
    "block size 12": (lambda: (torch.ones(4, 1, 12, 2), torch.ones(4, 1, 12, 2)), "source has block_size=12"),
    "padded rows": (lambda: (torch.ones(4, 1, 8, 2), torch.ones(4, 1, 8, 3)[..., :2]), "target has strides"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(device: str, case: str) -> None:
    make, message = BAD[case]
    with torch.device(device):
        source, target = make()
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match=f"minivllm::swap_blocks: {message}"):
        ops.swap_blocks(source, target, ids, ids)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", (ops.swap_blocks, swap_blocks_reference))
@pytest.mark.parametrize("name", ("source", "target"))
def test_host_memory_that_is_not_pinned_is_named(name: str, implementation: Callable[..., None]) -> None:
    caches = {"source": torch.ones(4, 1, 8, 2, device="cuda"), "target": torch.ones(4, 1, 8, 2, device="cuda")}
    caches[name] = caches[name].cpu()
    ids = torch.zeros(1, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match=f"minivllm::swap_blocks: {name} is in host memory that is not pinned"):
        implementation(**caches, source_ids=ids, target_ids=ids)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("source_ids", "target_ids"))
def test_ids_in_host_memory_are_named(name: str) -> None:
    ids = {"source_ids": torch.zeros(1, dtype=torch.int64, device="cuda")}
    ids["target_ids"] = ids["source_ids"].clone()
    ids[name] = ids[name].cpu()
    source, target = torch.ones(4, 1, 8, 2, device="cuda"), torch.ones(4, 1, 8, 2).pin_memory()
    with pytest.raises(RuntimeError, match=f"minivllm::swap_blocks: {name} is on"):
        ops.swap_blocks(source, target, **ids)


@pytest.mark.gpu
def test_swaps_in_a_cuda_graph_out_and_back(seed: int) -> None:
    cache = randn(8, 2, 16, 64, seed=seed, dtype=torch.bfloat16, device="cuda")
    host = torch.zeros(8, 2, 16, 64, dtype=torch.bfloat16).pin_memory()
    out, back = torch.empty_like(cache), torch.arange(3, device="cuda")
    sources = torch.zeros(3, dtype=torch.int64, device="cuda")
    ops.swap_blocks(cache, host, sources[:1], back[:1])  # loads the kernel before capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), no_device_sync():
        ops.swap_blocks(cache, host, sources, back)
        ops.swap_blocks(host, out, back, back)
    for trial in range(3):
        cache.copy_(randn(8, 2, 16, 64, seed=seed + trial, dtype=torch.bfloat16, device="cuda"))
        sources.copy_(torch.randperm(8, generator=generator(seed + trial))[:3])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out[:3], cache[sources]) and torch.equal(host[:3], cache[sources].cpu())


@pytest.mark.gpu
def test_composes_with_torch_compile_across_devices(seed: int) -> None:
    @torch.compile(fullgraph=True)
    def out_and_back(cache: Tensor, host: Tensor, ids: Tensor) -> Tensor:
        ops.swap_blocks(cache, host, ids, ids)
        ops.swap_blocks(host, cache, ids, ids.flip(0))
        return cache[0] * 2

    cache = randn(4, 2, 16, 64, seed=seed, dtype=torch.bfloat16, device="cuda")
    host = torch.zeros(4, 2, 16, 64, dtype=torch.bfloat16).pin_memory()
    want = cache[:3].flip(0)
    assert torch.equal(out_and_back(cache, host, torch.arange(3, device="cuda")), want[0] * 2)
    torch.cuda.synchronize()
    assert torch.equal(cache[:3], want) and torch.equal(host[:3].cuda(), want.flip(0))
