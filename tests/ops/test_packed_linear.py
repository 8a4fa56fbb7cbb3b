from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minivllm import ops
from tests.ops.support import randn

SHAPES = [(1, 1), (31, 7), (32, 256), (33, 257), (100, 70), (256, 768), (4096, 256), (200, 1000)]


def weights(out_features: int, in_features: int, exact: bool, seed: int) -> Tensor:
    weight = randn(out_features, in_features, seed=seed, dtype=torch.float32, device="cpu")
    return weight.bfloat16().float() if exact else weight


@pytest.mark.parametrize("exact", (True, False))
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_keeps_every_weight(shape: tuple[int, int], exact: bool, seed: int) -> None:
    weight = weights(*shape, exact, seed)
    packed = ops.pack_linear_weight(weight)
    narrow = bool((weight.bfloat16() == weight).all())
    assert packed.dtype == (torch.bfloat16 if narrow else torch.float32)
    assert torch.equal(packed.float().transpose(1, 2).flatten(0, 1)[: shape[0]], weight)


@pytest.mark.parametrize("exact", (True, False))
@pytest.mark.parametrize("rows", (0, 1, 2, 5, 11, 12, 13, 24, 64))
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(shape: tuple[int, int], rows: int, exact: bool, seed: int) -> None:
    out_features, in_features = shape
    weight = weights(out_features, in_features, exact, seed)
    x = randn(rows, in_features + 3, seed=seed + 1, dtype=torch.float32, device="cpu")[:, 1 : in_features + 1]
    got = ops.packed_linear(x, ops.pack_linear_weight(weight), out_features).double()
    # PyTorch's own error is taken from a matrix product of the same kind: for a row or two its library sums in another
    # order.
    many = randn(256, in_features, seed=seed + 2, dtype=torch.float32, device="cpu")
    torch_error = ((many @ weight.T).double() - many.double() @ weight.double().T).abs().max()
    exact = x.double() @ weight.double().T
    rounding = torch.finfo(torch.float32).eps * exact.abs().max() if rows else 0.0
    assert got.shape == (rows, out_features)
    assert ((got - exact).abs() <= 2 * torch_error + rounding).all()


def test_a_row_does_not_depend_on_its_neighbours(seed: int) -> None:
    packed = ops.pack_linear_weight(weights(300, 700, True, seed))
    x = randn(64, 700, seed=seed + 1, dtype=torch.float32, device="cpu")
    if ops.build_info().kind == "reference":
        pytest.skip("the PyTorch reference gives no such promise")
    together = ops.packed_linear(x, packed, 300)
    for rows in (slice(0, 1), slice(5, 7), slice(20, 33), slice(63, 64)):
        assert torch.equal(ops.packed_linear(x[rows], packed, 300), together[rows])


def test_nan_stays_in_its_row(seed: int) -> None:
    x = torch.ones(3, 40)
    x[1, 7] = float("nan")
    out = ops.packed_linear(x, ops.pack_linear_weight(weights(70, 40, True, seed)), 70)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


BAD = {
    "x of bfloat16": ((torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(1, 8, 32), 32), "x has dtype"),
    "in_features": ((torch.ones(2, 9), torch.ones(1, 8, 32), 32), "packed has shape"),
    "panel": ((torch.ones(2, 8), torch.ones(1, 8, 16), 32), "packed has shape"),
    "out_features": ((torch.ones(2, 8), torch.ones(1, 8, 32), 33), "out_features=33 does not belong to 1 panels"),
    "strided": ((torch.ones(2, 8), torch.ones(2, 16, 32)[:, :8], 64), "packed must be contiguous"),
    "columns": ((torch.ones(8, 2).T, torch.ones(1, 8, 32), 32), "x must be contiguous in its last dimension"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises(RuntimeError, match=message):
        ops.packed_linear(*arguments)
    with pytest.raises(RuntimeError, match="weight has dtype"):
        ops.pack_linear_weight(torch.ones(2, 2, dtype=torch.int32))
