"""Rows of one device tensor that are lent out and taken back; memory is needed only for as many as were lent at once.

The table doubles when no row is free, and a row keeps its number when it does.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowTable:
    """data: [capacity, width] of `dtype`; a row that is taken holds anything."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.data = torch.zeros(0, width, dtype=dtype, device=device)
        self._free: list[int] = []

    def take(self) -> int:
        """The number of a row that nobody has."""
        if not self._free:
            old, width = self.data, self.data.shape[1]
            capacity = max(1, 2 * len(old))
            self.data = old.new_empty(capacity, width)
            self.data[: len(old)] = old
            self._free = list(range(capacity - 1, len(old) - 1, -1))
        return self._free.pop()

    def give(self, row: int) -> None:
        """Take back a row; what is computed from now on may overwrite it."""
        self._free.append(row)

    def widen(self, width: int, fill: int) -> None:
        """Give every row at least `width` entries; new ones stand in front of the old ones and hold `fill`."""
        missing = width - self.data.shape[1]
        if missing > 0:
            front: Tensor = self.data.new_full((len(self.data), missing), fill)
            self.data = torch.cat((front, self.data), dim=1)
