from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.merge_attention_states import merge_attention_states_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, assert_close_to_exact, randn

INF = float("inf")


def state(
    tokens: int, heads: int, dim: int, *, seed: int, dtype: torch.dtype, device: str, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    out = randn(tokens, heads, dim, seed=seed, dtype=dtype, device=device)
    return out, randn(tokens, heads, seed=seed + 1, dtype=torch.float32, device=device, scale=scale)


def exact_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, for rows with keys on both sides."""
    lses = torch.stack((lse_a, lse_b)).double()
    shares = lses.softmax(0).unsqueeze(-1)
    return shares[0] * out_a.double() + shares[1] * out_b.double(), lses.logsumexp(0)


def check(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    out, lse = ops.merge_attention_states(*a, *b)
    torch_out, torch_lse = merge_attention_states_reference(*a, *b)
    exact_out, exact_lse = exact_merge(*a, *b)
    assert out.is_contiguous() and lse.is_contiguous()
    assert_close_to_exact(out, exact_out, torch_out)
    assert_close_to_exact(lse, exact_lse, torch_lse)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("head_dim", (1, 7, 64, 80, 128, 256, 4104))
@pytest.mark.parametrize(("tokens", "heads"), ((1, 1), (3, 5), (70, 16)))
def test_matches_float64(device: str, dtype: torch.dtype, head_dim: int, tokens: int, heads: int, seed: int) -> None:
    a, b = (state(tokens, heads, head_dim, seed=seed + i, dtype=dtype, device=device) for i in (0, 2))
    check(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", (30.0, 1000.0))
def test_lses_far_apart(device: str, scale: float, seed: int) -> None:
    a, b = (state(40, 4, 64, seed=seed + i, dtype=torch.float32, device=device, scale=scale) for i in (0, 2))
    check(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("offset", (0, 1, 8))
def test_strided_views(device: str, dtype: torch.dtype, offset: int, seed: int) -> None:
    a, b = (state(9, 6, 128 + offset, seed=seed + i, dtype=dtype, device=device) for i in (0, 2))
    check((a[0][:, 1:4, offset:], a[1][:, 1:4]), (b[0][:, ::2, :128], b[1][:, 3:]))


@pytest.mark.parametrize("device", DEVICES)
def test_merging_parts_of_attention_gives_attention_over_all(device: str, seed: int) -> None:
    q, k, v = (randn(n, 4, 64, seed=seed + i, dtype=torch.float64, device=device) for i, n in enumerate((10, 300, 300)))

    def attend(keys: slice) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("qhd,khd->qhk", q, k[keys])
        return torch.einsum("qhk,khd->qhd", scores.softmax(-1), v[keys]).float(), scores.logsumexp(-1).float()

    merged = ops.merge_attention_states(*attend(slice(0, 90)), *attend(slice(90, 300)))
    for got, want in zip(merged, attend(slice(0, 300)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_an_empty_side_is_not_looked_at(device: str, dtype: torch.dtype, seed: int) -> None:
    a, b = (state(3, 2, 72, seed=seed + i, dtype=dtype, device=device) for i in (0, 2))
    for out, lse, rows in ((*a, (0, 2)), (*b, (1, 2))):
        for row in rows:
            out[row], lse[row] = float("nan"), -INF
    out, lse = ops.merge_attention_states(*a, *b)
    assert torch.equal(out[0], b[0][0]) and torch.equal(lse[0], b[1][0])  # the other side, bit for bit
    assert torch.equal(out[1], a[0][1]) and torch.equal(lse[1], a[1][1])
    assert (out[2] == 0).all() and (lse[2] == -INF).all()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device: str, seed: int) -> None:
    a, b = (state(4, 1, 64, seed=seed + i, dtype=torch.bfloat16, device=device) for i in (0, 2))
    want = ops.merge_attention_states(*a, *b)
    a[1][1], b[1][2] = float("nan"), INF
    out, lse = ops.merge_attention_states(*a, *b)
    assert out[1:3].isnan().all() and lse[1:3].isnan().all()
    for row in (0, 3):
        assert torch.equal(out[row], want[0][row]) and torch.equal(lse[row], want[1][row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", ((0, 4, 8), (3, 0, 8), (3, 4, 0)))
def test_empty(device: str, shape: tuple[int, int, int]) -> None:
    a, b = (state(*shape, seed=i, dtype=torch.float32, device=device) for i in (0, 2))
    out, lse = ops.merge_attention_states(*a, *b)
    assert out.shape == shape
    torch.testing.assert_close(lse, torch.logaddexp(a[1], b[1]))


@pytest.mark.gpu
def test_offsets_beyond_int32(seed: int) -> None:
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of device memory")
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device="cuda")
    far = storage.as_strided((2, 1, 64), (2**31, 64, 1))
    a, b = (state(2, 1, 64, seed=seed + i, dtype=torch.bfloat16, device="cuda") for i in (0, 2))
    far.copy_(a[0])
    check((far, a[1]), b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("head_dim", (80, 128, 2056))
def test_many_rows_equal_few(dtype: torch.dtype, head_dim: int, seed: int) -> None:
    tokens = 3001 if head_dim < 1000 else 301
    given = [x for i in (0, 2) for x in state(tokens, 7, head_dim, seed=seed + i, dtype=dtype, device="cuda")]
    given[1][5::9], given[3][7::9] = -INF, -INF
    whole = ops.merge_attention_states(*given)
    for start in range(0, tokens, 250):
        piece = ops.merge_attention_states(*(x[start : start + 250] for x in given))
        for few, many in zip(piece, whole, strict=True):
            assert torch.equal(few, many[start : start + 250])


@pytest.mark.gpu
def test_large_merges_in_a_row_see_what_the_ones_before_wrote(seed: int) -> None:
    # Launches overlap, and a later one's first reads are announced to the L2 cache while the earlier one still writes.
    first, other = (state(3001, 16, 128, seed=seed + i, dtype=torch.bfloat16, device="cuda") for i in (0, 2))

    def chain(wait: bool) -> tuple[Tensor, Tensor]:
        merged = first
        for _ in range(30):
            merged = ops.merge_attention_states(*merged, *other)
            if wait:
                torch.cuda.synchronize()
        return merged

    want = chain(wait=True)
    for _ in range(10):
        for got, expected in zip(chain(wait=False), want, strict=True):
            assert torch.equal(got, expected)
