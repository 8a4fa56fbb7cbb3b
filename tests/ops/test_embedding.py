from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.embedding import embedding_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, generator, randn


def random_ids(count: int, low: int, high: int, seed: int, device: str) -> Tensor:
    return torch.randint(low, high, (count,), generator=generator(seed)).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("hidden", (1, 2, 7, 64, 100, 1024, 4096, 40960))
@pytest.mark.parametrize("tokens", (0, 1, 3, 70))
def test_is_a_look_up(device: str, dtype: torch.dtype, hidden: int, tokens: int, seed: int) -> None:
    weight = randn(50, hidden, seed=seed, dtype=dtype, device=device)
    ids = random_ids(tokens, 0, 50, seed + 1, device)
    out = ops.embedding(ids, weight)
    assert out.is_contiguous() and torch.equal(out, torch.nn.functional.embedding(ids, weight))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", (0, 1, 8))
def test_rows_apart(device: str, offset: int, seed: int) -> None:
    weight = randn(50, 80 + offset, seed=seed, dtype=torch.float16, device=device)[:, offset:]
    ids = random_ids(31, 0, 50, seed + 1, device)
    assert torch.equal(ops.embedding(ids, weight), weight[ids])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_shards_sum_to_the_whole(device: str, dtype: torch.dtype, seed: int) -> None:
    weight = randn(64, 24, seed=seed, dtype=dtype, device=device)
    ids = random_ids(200, 0, 64, seed + 1, device)
    parts = [ops.embedding(ids, weight[start : start + 16], start) for start in range(0, 64, 16)]
    assert torch.equal(torch.stack(parts).sum(0), weight[ids])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", (ops.embedding, embedding_reference))
@pytest.mark.parametrize("start", (0, 7))
def test_ids_of_no_row_give_zeros(device: str, function: object, start: int, seed: int) -> None:
    weight = randn(10, 24, seed=seed, dtype=torch.float32, device=device)
    weight[0] = float("nan")  # zeros are not a product with a row
    far = [-(2**63), -(2**40), -1, start - 1, start + 10, 2**40, 2**63 - 1]
    ids = torch.tensor([start + 3, *far, start + 9], device=device)
    out = ops.embedding(ids, weight, start) if function is ops.embedding else embedding_reference(ids, weight, start)
    assert torch.equal(out[0], weight[3]) and torch.equal(out[-1], weight[9])
    assert out[1:-1].shape == (len(far), 24) and (out[1:-1] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_an_empty_table_gives_zeros(device: str) -> None:
    ids = torch.tensor([0, 1], device=device)
    assert torch.equal(ops.embedding(ids, torch.ones(0, 8, device=device)), torch.zeros(2, 8, device=device))
    assert ops.embedding(ids, torch.ones(4, 0, device=device)).shape == (2, 0)


@pytest.mark.parametrize("device", DEVICES)
def test_offsets_beyond_int32(device: str) -> None:
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)  # untouched pages cost no memory on a CPU
    weight = storage.as_strided((2, 64), (2**31, 1))
    weight[1] = torch.arange(64)
    assert torch.equal(ops.embedding(torch.tensor([1], device=device), weight), weight[1:])
