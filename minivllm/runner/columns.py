"""Columns of numbers on their way from the host to the device: many of one type in one transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


def upload(columns: Sequence[npt.NDArray[Any]], device: torch.device) -> tuple[Tensor, ...]:
    """Columns of one dtype, each [any length] -> tensors on `device`; the host does not wait."""
    packed = torch.from_numpy(np.concatenate(columns)).to(device, non_blocking=True)
    parts: tuple[Tensor, ...] = packed.split([len(column) for column in columns])
    return parts


def ints(values: Sequence[int]) -> IntArray:
    """A column of int64."""
    return np.array(values, dtype=np.int64)


def floats(values: Sequence[float]) -> FloatArray:
    """A column of float32."""
    return np.array(values, dtype=np.float32)
