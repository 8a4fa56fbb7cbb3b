"""Batch: its columns start empty and apart, and its size is what the rows add up to."""

from __future__ import annotations

import random

from minivllm.batch import Batch


def test_num_tokens_is_the_sum_of_the_rows(seed: int) -> None:
    lengths = [random.Random(seed).randrange(1, 50) for _ in range(20)]
    assert Batch(lengths=lengths).num_tokens == sum(lengths)
    assert Batch().num_tokens == 0


def test_batches_share_no_column() -> None:
    first, second = Batch(), Batch()
    first.slots.append(1)
    first.token_ids.append(7)
    assert second == Batch()
