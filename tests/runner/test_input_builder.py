"""The columns of a step against a plain per-token computation, over random sequences of batches."""

from __future__ import annotations

import random

import pytest
import torch

from minivllm.batch import Batch, SlotParams
from minivllm.runner.input_builder import InputBuilder

BLOCK = 8
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def test_columns_equal_a_plain_loop(seed: int) -> None:
    rng = random.Random(seed)
    builder = InputBuilder(max_num_seqs=5, max_blocks=6, block_size=BLOCK, device=torch.device("cpu"))
    tables = {slot: rng.sample(range(100), 6) for slot in range(5)}
    params = [
        SlotParams(slot, rng.random(), rng.randrange(50), rng.random(), rng.random(), rng.getrandbits(63))
        for slot in range(5)
    ]
    last = {3: 77, 1: 55}
    builder.keep_last_tokens(torch.tensor(list(last)), torch.tensor(list(last.values())))
    batch = Batch(
        slots=[3, 1, 4, 0],
        starts=[17, 8, 0, 5],
        lengths=[1, 1, 9, 3],
        token_counts=[0, 0, 9, 3],
        token_ids=list(range(200, 212)),
        samples=[0, 1, 3],
        new_slots=params,
        block_slots=[slot for slot in tables for _ in range(6)],
        block_indices=[index for _ in tables for index in range(6)],
        block_ids=[block for blocks in tables.values() for block in blocks],
    )
    fwd, sampling = builder.build(batch)
    assert sampling is not None
    positions = [start + i for start, length in zip(batch.starts, batch.lengths, strict=True) for i in range(length)]
    slots = [slot for slot, length in zip(batch.slots, batch.lengths, strict=True) for _ in range(length)]
    assert fwd.input_ids.tolist() == [77, 55, *range(200, 212)]
    assert fwd.positions.tolist() == positions
    expected = [tables[slot][p // BLOCK] * BLOCK + p % BLOCK for slot, p in zip(slots, positions, strict=True)]
    assert fwd.slot_mapping.tolist() == expected
    assert fwd.block_tables.tolist() == [tables[slot] for slot in batch.slots]
    assert fwd.seq_lens.tolist() == [18, 9, 9, 8]
    assert fwd.cu_seqlens_q.tolist() == [0, 1, 2, 11, 14]
    assert fwd.max_seqlen_q == 9
    assert fwd.sample_indices.tolist() == [0, 1, 13]
    assert sampling.slots.tolist() == [3, 1, 0]
    assert sampling.top_k.tolist() == [params[slot].top_k for slot in (3, 1, 0)]
    torch.testing.assert_close(sampling.temperature, torch.tensor([params[slot].temperature for slot in (3, 1, 0)]))


def seeds_of(builder: InputBuilder, slots: list[int], starts: list[int]) -> list[int]:
    count = len(slots)
    _, sampling = builder.build(Batch(slots, starts, [1] * count, [0] * count, [], list(range(count))))
    assert sampling is not None
    return sampling.seeds.tolist()


def test_seeds_depend_on_request_and_position_alone() -> None:
    builder = InputBuilder(4, 4, BLOCK, torch.device("cpu"))
    build = builder.build
    build(Batch([0], [0], [1], [1], [1], [], [SlotParams(slot, 1.0, 0, 1.0, 0.0, 42) for slot in range(4)]))
    alone = seeds_of(builder, [2], [9])
    assert seeds_of(builder, [0, 2, 1], [3, 9, 9])[1:] == [alone[0]] * 2
    assert len(set(seeds_of(builder, [0, 1, 2, 3], [3, 4, 5, 6]))) == 4


def test_no_sampling_columns_without_a_draw() -> None:
    builder = InputBuilder(2, 4, BLOCK, torch.device("cpu"))
    fwd, sampling = builder.build(Batch([0], [0], [3], [3], [1, 2, 3], []))
    assert sampling is None
    assert len(fwd.sample_indices) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_later_block_table_entries_win(device: str, seed: int) -> None:
    rng = random.Random(seed)
    builder = InputBuilder(4, 6, BLOCK, torch.device(device))
    expected = [[0] * 6 for _ in range(4)]
    for _ in range(5):
        entries = [(rng.randrange(4), rng.randrange(6), rng.randrange(1000)) for _ in range(200)]
        for slot, index, block in entries:
            expected[slot][index] = block
        slots, indices, blocks = map(list, zip(*entries, strict=True))
        order = rng.sample(range(4), 4)
        fwd, _ = builder.build(
            Batch(
                order, [47] * 4, [1] * 4, [0] * 4, [], [0], block_slots=slots, block_indices=indices, block_ids=blocks
            )
        )
        assert fwd.block_tables.tolist() == [expected[slot] for slot in order]
        assert fwd.slot_mapping.tolist() == [expected[slot][5] * BLOCK + 7 for slot in order]
