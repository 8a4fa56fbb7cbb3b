from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.rms_norm import fused_add_rms_norm_reference, rms_norm_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, assert_close_to_exact, randn

EPS = 1e-6
HIDDEN = (1, 2, 7, 8, 64, 100, 128, 1000, 1024, 4096, 5121, 8192, 40960)


def exact_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("rows", (0, 1, 3, 70))
def test_rms_norm_matches_float64(device: str, dtype: torch.dtype, hidden: int, rows: int, seed: int) -> None:
    x = randn(rows, hidden, seed=seed, dtype=dtype, device=device, scale=3.0)
    weight = randn(hidden, seed=seed + 1, dtype=dtype, device=device)
    assert_close_to_exact(ops.rms_norm(x, weight, EPS), exact_rms_norm(x, weight), rms_norm_reference(x, weight, EPS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("offset", (0, 1, 8))
def test_rms_norm_of_heads_in_packed_qkv(device: str, dtype: torch.dtype, offset: int, seed: int) -> None:
    heads, dim = 3, 64
    packed = randn(11, offset + 2 * heads * dim, seed=seed, dtype=dtype, device=device)
    x = packed[:, offset : offset + heads * dim].unflatten(-1, (heads, dim))
    weight = randn(dim, seed=seed + 1, dtype=dtype, device=device)
    got = ops.rms_norm(x, weight, EPS)
    assert got.is_contiguous()
    assert_close_to_exact(got, exact_rms_norm(x, weight), rms_norm_reference(x, weight, EPS))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_fused_add_rms_norm_writes_both(device: str, dtype: torch.dtype, hidden: int, seed: int) -> None:
    x = randn(9, 2 * hidden, seed=seed, dtype=dtype, device=device)[:, :hidden]  # strided rows
    residual = randn(9, hidden, seed=seed + 1, dtype=dtype, device=device)
    weight = randn(hidden, seed=seed + 2, dtype=dtype, device=device)
    expected_x, expected_residual = x.clone(), residual.clone()
    fused_add_rms_norm_reference(expected_x, expected_residual, weight, EPS)
    exact = exact_rms_norm(expected_residual, weight)
    ops.fused_add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(residual, expected_residual)  # one rounded addition: the same bits
    assert_close_to_exact(x, exact, expected_x)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_its_neighbours(device: str, seed: int) -> None:
    x = randn(33, 576, seed=seed, dtype=torch.bfloat16, device=device)
    weight = randn(576, seed=seed + 1, dtype=torch.bfloat16, device=device)
    together = ops.rms_norm(x, weight, EPS)
    for row in (0, 17, 32):
        assert torch.equal(ops.rms_norm(x[row : row + 1], weight, EPS), together[row : row + 1])


@pytest.mark.parametrize("device", DEVICES)
def test_nan_and_large_values_stay_in_their_row(device: str) -> None:
    x = torch.ones(3, 64, device=device)
    x[1, 5] = float("nan")
    x[2] = 1e18
    out = ops.rms_norm(x, torch.ones(64, device=device), EPS)
    assert torch.isfinite(out[0]).all() and out[1].isnan().all()
    assert torch.allclose(out[2], torch.ones(64, device=device))


BAD = {
    "weight shape": (
        lambda: (torch.ones(2, 8), torch.ones(7)),
        r"weight has shape \[7\], expected \[hidden\] with hidden=8",
    ),
    "dtype of x": (lambda: (torch.ones(2, 8, dtype=torch.float64), torch.ones(8)), "x has dtype"),
    "dtype of weight": (lambda: (torch.ones(2, 8), torch.ones(8, dtype=torch.bfloat16)), "weight has dtype"),
    "column stride": (lambda: (torch.ones(8, 2).T, torch.ones(8)), "x must be contiguous in its last dimension"),
    "scalar": (lambda: (torch.tensor(1.0), torch.ones(1)), "x has shape"),
    "three strides": (lambda: (torch.ones(2, 3, 4, 5, 8)[:, :2, :3, :4], torch.ones(8)), "more than two strides"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(device: str, case: str) -> None:
    if case == "three strides" and ops.build_info().kind == "reference":
        pytest.skip("the PyTorch reference takes any strides")
    make, message = BAD[case]
    x, weight = (tensor.to(device) for tensor in make())
    if case == "three strides":
        x = torch.ones(2, 3, 4, 5, 8, device=device)[:, :2, :3, :4]
    with pytest.raises(RuntimeError, match=message):
        ops.rms_norm(x, weight, EPS)


@pytest.mark.gpu
def test_rows_beyond_int32(seed: int) -> None:
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of device memory")
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    x = storage.as_strided((2, 4096), (2**31, 1))
    x.copy_(randn(2, 4096, seed=seed, dtype=torch.bfloat16, device="cuda"))
    near, residual = x.contiguous(), randn(2, 4096, seed=seed + 1, dtype=torch.bfloat16, device="cuda")
    weight, other = residual[0].clone(), residual.clone()
    assert torch.equal(ops.rms_norm(x, weight, EPS), ops.rms_norm(near, weight, EPS))
    ops.fused_add_rms_norm(x, residual, weight, EPS)
    ops.fused_add_rms_norm(near, other, weight, EPS)
    assert torch.equal(x, near) and torch.equal(residual, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("hidden", (1000, 1024, 4096, 40960))
def test_many_rows_equal_few(dtype: torch.dtype, hidden: int, seed: int) -> None:
    x, residual = (randn(3001, hidden, seed=seed + i, dtype=dtype, device="cuda") for i in (0, 1))
    weight = randn(hidden, seed=seed + 2, dtype=dtype, device="cuda")

    def normed(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        total, normed_total = residual[first:last].clone(), x[first:last].clone()
        ops.fused_add_rms_norm(normed_total, total, weight, EPS)
        return ops.rms_norm(x[first:last], weight, EPS), total, normed_total

    together, even = normed(0, 3001), normed(0, 3000)
    for all_rows, even_rows in zip(together, even, strict=True):
        assert torch.equal(all_rows[:3000], even_rows)
    for row in (0, 999, 3000):
        for alone, all_rows in zip(normed(row, row + 1), together, strict=True):
            assert torch.equal(alone[0], all_rows[row])
