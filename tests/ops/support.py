"""What the tests of the ops share: devices, dtypes, and the one way an error is judged.

A kernel is right when its error against float64 is at most twice PyTorch's own error in the same dtype (the reference
computed in that dtype), plus a rounding of the largest value for cases where PyTorch happens to be exact.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def generator(seed: int, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    """Fresh normal numbers, drawn on the CPU so that every device sees the same."""
    return (torch.randn(*shape, generator=generator(seed)) * scale).to(device, dtype)


def assert_close_to_exact(got: Tensor, exact: Tensor, torch_result: Tensor) -> None:
    """`got` is within twice the error of `torch_result`, both against the float64 result `exact`."""
    assert got.dtype == torch_result.dtype and got.shape == exact.shape
    wide = got.double()
    assert torch.isfinite(wide).all(), "the result holds NaN or infinity"
    error = (wide - exact).abs().max().item() if exact.numel() else 0.0
    torch_error = (torch_result.double() - exact).abs().max().item() if exact.numel() else 0.0
    rounding = torch.finfo(got.dtype).eps * max(exact.abs().max().item() if exact.numel() else 0.0, 1e-6)
    limit = 2.0 * torch_error + rounding
    assert error <= limit, f"error {error:.3e} exceeds {limit:.3e} (PyTorch's own error is {torch_error:.3e})"


@contextlib.contextmanager
def no_device_sync() -> Iterator[None]:
    """Any call inside that makes the host wait for the GPU raises."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that the mode itself is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
