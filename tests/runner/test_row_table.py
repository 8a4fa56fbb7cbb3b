"""Rows keep their number and content while the table grows, and are lent to one holder at a time."""

from __future__ import annotations

import random

import torch

from minivllm.runner.row_table import RowTable


def test_rows_keep_what_is_written_to_them(seed: int) -> None:
    rng = random.Random(seed)
    table = RowTable(3, torch.int64, torch.device("cpu"))
    held: dict[int, int] = {}
    most = 0
    for value in range(300):
        if held and rng.random() < 0.45:
            row = rng.choice(list(held))
            del held[row]
            table.give(row)
        else:
            row = table.take()
            assert row not in held
            held[row] = value
            table.data[row] = value
        most = max(most, len(held))
        assert all(table.data[row].tolist() == [value] * 3 for row, value in held.items())
    assert most <= len(table.data) < 2 * most


def test_widening_keeps_the_end_of_a_row() -> None:
    table = RowTable(0, torch.int64, torch.device("cpu"))
    table.widen(2, -1)
    first = table.take()
    table.data[first] = torch.tensor([5, 6])
    table.widen(4, -1)
    table.widen(3, -1)
    second = table.take()
    table.data[second] = 7
    assert table.data[first].tolist() == [-1, -1, 5, 6]
    assert table.data[second].tolist() == [7] * 4
