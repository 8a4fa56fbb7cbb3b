from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from minivllm import ops
from minivllm.ops.activation import gelu_and_mul_reference, silu_and_mul_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, assert_close_to_exact, randn


def exact_silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("d", (0, 1, 7, 16, 100, 768, 3072, 12289))
@pytest.mark.parametrize("rows", (0, 1, 5, 33))
def test_matches_float64(device: str, dtype: torch.dtype, d: int, rows: int, seed: int) -> None:
    x = randn(rows, 2 * d, seed=seed, dtype=dtype, device=device, scale=4.0)
    got = ops.silu_and_mul(x)
    assert got.shape == (rows, d)
    assert_close_to_exact(got, exact_silu_and_mul(x), silu_and_mul_reference(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_strided_rows_of_three_dimensions(device: str, dtype: torch.dtype, seed: int) -> None:
    x = randn(3, 4, 50, seed=seed, dtype=dtype, device=device)[:, :2, 3:33]
    got = ops.silu_and_mul(x)
    assert got.is_contiguous()
    assert_close_to_exact(got, exact_silu_and_mul(x), silu_and_mul_reference(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_one_row_without_leading_dimensions(device: str, dtype: torch.dtype, seed: int) -> None:
    x = randn(64, seed=seed, dtype=dtype, device=device)
    assert torch.equal(ops.silu_and_mul(x), ops.silu_and_mul(x.unsqueeze(0))[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounds_silu_before_the_product(device: str, dtype: torch.dtype, seed: int) -> None:
    x = randn(64, 512, seed=seed, dtype=dtype, device=device)
    gate, up = x.chunk(2, dim=-1)
    same = (ops.silu_and_mul(x) == functional.silu(gate) * up).float().mean().item()
    assert same > 0.995  # a last bit of the exponential may fall on the other side of a rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_extreme_values(device: str, dtype: torch.dtype) -> None:
    huge = 6e4
    gate = [0.0, -0.0, huge, -huge, float("inf"), float("nan"), 88.0, -88.0, 1.0]
    x = torch.tensor([gate + [1.0] * 8 + [float("nan")]], dtype=dtype, device=device)
    got = ops.silu_and_mul(x)[0].float()
    assert got[0] == 0 and got[1] == 0 and got[2] == torch.tensor(huge, dtype=dtype).float() and got[4] == float("inf")
    assert got[5].isnan() and got[8].isnan()
    assert abs(got[3].item()) < 1e-30 and abs(got[7].item()) < 1e-30 and got[6] == 88.0


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_its_neighbours(device: str, seed: int) -> None:
    x = randn(200, 1538, seed=seed, dtype=torch.bfloat16, device=device)
    together = ops.silu_and_mul(x)
    for row in (0, 99, 199):
        assert torch.equal(ops.silu_and_mul(x[row : row + 1]), together[row : row + 1])


def exact_gelu_and_mul(x: Tensor, approximate: str) -> Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return functional.gelu(gate, approximate=approximate) * up


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("approximate", ("none", "tanh"))
@pytest.mark.parametrize("d", (0, 1, 7, 16, 768, 3072))
@pytest.mark.parametrize("scale", (0.05, 4.0))
def test_gelu_matches_float64(
    device: str, dtype: torch.dtype, approximate: str, d: int, scale: float, seed: int
) -> None:
    rows = 5 if d == 0 else 5 + 4000 // d  # enough elements that PyTorch's own worst error is a typical one
    x = randn(rows, 2 * d, seed=seed, dtype=dtype, device=device, scale=scale)
    got = ops.gelu_and_mul(x, approximate=approximate)
    assert got.shape == (rows, d)
    torch_result = gelu_and_mul_reference(x, tanh=approximate == "tanh")
    assert_close_to_exact(got, exact_gelu_and_mul(x, approximate), torch_result)


@pytest.mark.parametrize("device", DEVICES)
def test_gelu_has_a_small_relative_error_on_both_sides(device: str) -> None:
    gate = torch.linspace(-5.0, 12.0, 20001, device=device)
    got = ops.gelu_and_mul(torch.cat((gate, torch.ones_like(gate))))
    exact = functional.gelu(gate.double())
    assert ((got - exact).abs() / exact.abs().clamp(min=1e-30)).nan_to_num().max().item() < 3e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("approximate", ("none", "tanh"))
def test_gelu_of_extreme_values(device: str, dtype: torch.dtype, approximate: str) -> None:
    huge = 6e4
    gate = [0.0, -0.0, huge, -huge, float("inf"), float("nan"), 88.0, -88.0, 1.0]
    x = torch.tensor([gate + [1.0] * 8 + [float("nan")]], dtype=dtype, device=device)
    got = ops.gelu_and_mul(x, approximate=approximate)[0].float()
    assert got[0] == 0 and got[1] == 0 and got[2] == torch.tensor(huge, dtype=dtype).float() and got[4] == float("inf")
    assert got[5].isnan() and got[8].isnan() and got[6] == 88.0
    assert abs(got[3].item()) < 1e-30 and abs(got[7].item()) < 1e-30


def test_an_unknown_approximation_is_named() -> None:
    with pytest.raises(RuntimeError, match="approximate is 'erf', expected 'none' or 'tanh'"):
        ops.gelu_and_mul(torch.ones(2, 4), approximate="erf")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", (2, 3000))
def test_rows_beyond_int32(rows: int, seed: int) -> None:
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of device memory")
    stride = 2**31 // (rows - 1) + 8
    storage = torch.empty(stride * rows, dtype=torch.bfloat16, device="cuda")
    x = storage.as_strided((rows, 4096), (stride, 1))
    x.copy_(randn(rows, 4096, seed=seed, dtype=torch.bfloat16, device="cuda"))
    assert torch.equal(ops.silu_and_mul(x), ops.silu_and_mul(x.contiguous()))


BAD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "odd width": (lambda: torch.ones(2, 7), "expected an even last dimension"),
    "dtype": (lambda: torch.ones(2, 8, dtype=torch.float64), "x has dtype"),
    "column stride": (lambda: torch.ones(8, 2).T, "x must be contiguous in its last dimension"),
    "scalar": (lambda: torch.tensor(1.0), "x has shape"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(device: str, case: str) -> None:
    make, message = BAD[case]
    x = make()
    x = x.to(device) if x.is_contiguous() else x.T.to(device).T
    with pytest.raises(RuntimeError, match=message):
        ops.silu_and_mul(x)
