"""The decode kernel of paged_attention on CUDA: plans, cut rows, and what a row may not depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from tests.ops.attention_support import Packed, Paged
from tests.ops.support import assert_close_to_exact, no_device_sync, randn

pytestmark = pytest.mark.gpu

# (num_heads, num_kv_heads, head_dim): groups of 1 to 64, padded head_dims, more heads than are computed side by side
DECODED = (
    (16, 8, 128),
    (32, 8, 128),
    (16, 2, 128),
    (4, 4, 64),
    (8, 1, 64),
    (24, 2, 128),
    (64, 1, 128),
    (8, 4, 256),
    (16, 1, 256),
    (4, 2, 80),
    (20, 20, 32),
)
# Borders of tiles (16 keys) and chunks (64 or 128), and the changes from one chunk size to another
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 0, 512, 513, 1000, 2048, 2049, 4097, 8193]


def random(
    lengths: list[int], heads: tuple[int, int, int], seed: int, queries: list[int] | None = None, **options: Any
) -> tuple[Packed, Paged]:
    dtype = options.pop("dtype", torch.bfloat16)
    block_size = options.pop("block_size", 16)
    queries = queries or [1] * len(lengths)
    num_heads, num_kv_heads, head_dim = heads
    q = randn(sum(queries), num_heads, head_dim, seed=seed, dtype=dtype, device="cuda")
    k, v = randn(sum(lengths), 2 * num_kv_heads, head_dim, seed=seed + 2, dtype=dtype, device="cuda").chunk(2, dim=1)
    packed = Packed(q, k, v, queries, lengths, head_dim**-0.5, options)
    return packed, Paged.from_packed(packed, block_size, seed + 1)


def plan_of(paged: Paged) -> Tensor:
    return ops.plan_paged_attention(
        paged.seq_lens,
        paged.cu_seqlens_q,
        paged.longest,
        max_seqlen_k=paged.block_tables.shape[1] * paged.k_cache.shape[2],
        num_heads=paged.q.shape[1],
        num_kv_heads=paged.k_cache.shape[1],
        head_dim=paged.q.shape[2],
        window=paged.options.get("window", 0),
    )


def run(paged: Paged, plan: Tensor | None = None) -> Tensor:
    return ops.paged_attention(
        paged.q,
        paged.k_cache,
        paged.v_cache,
        paged.block_tables,
        paged.seq_lens,
        paged.cu_seqlens_q,
        paged.longest,
        scale=paged.scale,
        plan=plan,
        **paged.options,
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("heads", DECODED)
@pytest.mark.parametrize("block_size", (8, 16, 128))
def test_matches_float64(dtype: torch.dtype, heads: tuple[int, int, int], block_size: int, seed: int) -> None:
    packed, paged = random(LENGTHS, heads, seed, dtype=dtype, block_size=block_size)
    got, lse = paged.run_with_lse()
    (exact, exact_lse), (reference, _) = packed.exact(), paged.reference()
    assert_close_to_exact(got, exact, reference)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("heads", ((8, 4, 128), (16, 4, 64), (12, 4, 64), (16, 1, 256)))
@pytest.mark.parametrize("options", ({}, {"window": 77}, {"window": 4000, "softcap": 30.0}))
def test_a_few_queries_each(heads: tuple[int, int, int], options: dict[str, Any], seed: int) -> None:
    group = heads[0] // heads[1]
    most = max(1, 16 // group)
    queries = [1 + i % most for i in range(6)]
    packed, paged = random([500, 700, 5000, 64, most, 8200], heads, seed, queries, **options)
    (exact, _), (reference, _) = packed.exact(), paged.reference()
    assert_close_to_exact(run(paged), exact, reference)


def test_beside_prompts(seed: int) -> None:
    """Decode rows, a chunk of a prompt and a whole prompt in one call: two kernels share the output."""
    packed, paged = random([900, 300, 40, 4000, 17], (16, 8, 128), seed, [1, 100, 40, 1, 2])
    assert_close_to_exact(run(paged, plan_of(paged)), packed.exact()[0], paged.reference()[0])


@pytest.mark.parametrize("heads", DECODED)
@pytest.mark.parametrize("options", ({}, {"window": 700}))
def test_a_row_has_the_same_bits_alone_and_in_a_batch(
    heads: tuple[int, int, int], options: dict[str, Any], seed: int
) -> None:
    """Alone a row is cut between many thread blocks, in a large batch it is one thread block's: the same bits."""
    lengths = [3000, 64, 8000, 1, 700, 200] + [1 + 37 * i % 900 for i in range(400)]
    _, paged = random(lengths, heads, seed, **options)
    together = run(paged)
    for row in (0, 1, 2, 4, 5, 404):
        alone = paged.of_sequence(row, 0, 1)
        assert torch.equal(run(alone)[0], together[row]), row


def test_every_cut_of_a_row(seed: int) -> None:
    """Growing numbers of equal rows move the cuts through a row; its bits stay."""
    _, paged = random([6000] * 40, (16, 8, 128), seed)
    expected = run(paged)
    for rows in range(1, 40):
        few = replace(
            paged,
            q=paged.q[:rows],
            block_tables=paged.block_tables[:rows],
            seq_lens=paged.seq_lens[:rows],
            cu_seqlens_q=paged.cu_seqlens_q[: rows + 1],
        )
        plan = plan_of(few)
        for _ in range(2):  # its counters reset themselves, whoever merged a row
            assert torch.equal(run(few, plan), expected[:rows]), rows


@pytest.mark.parametrize("rows", (16, 24, 64, 256))
def test_rows_in_step_with_the_teams(rows: int, seed: int) -> None:
    """Where the plan of an H200 leaves a team without work (16 and 64 equal rows), and where it does not."""
    packed, paged = random([513] * rows, (16, 8, 128), seed)
    got = run(paged)
    assert_close_to_exact(got, packed.exact()[0], paged.reference()[0])
    alone = paged.of_sequence(rows - 1, 0, 1)
    assert torch.equal(run(alone)[0], got[rows - 1])


def test_one_plan_serves_many_layers(seed: int) -> None:
    """Its counters reset themselves, and it holds nothing of the keys."""
    _, paged = random([5000, 1, 300, 70000], (16, 8, 128), seed)
    _, other = random([5000, 1, 300, 70000], (16, 8, 128), seed + 7)
    plan = plan_of(paged)
    first, second = run(paged), run(other)
    for _ in range(3):
        assert torch.equal(run(paged, plan), first) and torch.equal(run(other, plan), second)


def test_a_plan_of_other_shapes(seed: int) -> None:
    _, paged = random([500, 20], (16, 8, 128), seed)
    with pytest.raises(RuntimeError, match=r"plan has \d+ words, expected \d+; make it with plan_paged_attention"):
        run(paged, plan_of(random([500, 20], (16, 8, 64), seed)[1]))
    with pytest.raises(RuntimeError, match="plan has dtype"):
        run(paged, plan_of(paged).long())
    # The same number of words, another window: only the GPU can see it.
    windowed = plan_of(replace(paged, options={"window": 100}))
    assert run(paged, windowed).isnan().all()


def test_graph_replays_with_other_lengths_and_fewer_rows(seed: int) -> None:
    _, paged = random([3000, 900, 17, 5000], (16, 8, 128), seed)
    seq_lens, cu = paged.seq_lens.clone(), paged.cu_seqlens_q.clone()
    static = replace(paged, seq_lens=seq_lens, cu_seqlens_q=cu)
    run(static, plan_of(static))  # loads the kernels before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static, plan_of(static))
    for lengths, rows in (([3000, 900, 17, 5000], 4), ([1, 899, 16, 4999], 4), ([2048, 5, 0, 0], 2), ([7, 0, 0, 0], 1)):
        seq_lens.copy_(torch.tensor(lengths))
        cu.copy_(torch.arange(5).clamp(max=rows))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, run(replace(paged, seq_lens=seq_lens.clone(), cu_seqlens_q=cu.clone())))
        assert out[rows:].count_nonzero() == 0


def test_neither_plan_nor_attention_waits_for_the_gpu(seed: int) -> None:
    _, paged = random([3000, 900], (16, 8, 128), seed)
    run(paged, plan_of(paged))
    with no_device_sync():
        run(paged, plan_of(paged))
        run(paged)


def test_lengths_beyond_the_table_stay_within_it(seed: int) -> None:
    """A caller's mistake must not write outside the plan."""
    _, paged = random([64, 64], (16, 8, 128), seed)
    too_long = replace(paged, seq_lens=torch.full_like(paged.seq_lens, 1 << 30), block_tables=paged.block_tables * 0)
    run(too_long)
    torch.cuda.synchronize()
    assert torch.isfinite(run(paged)).all()
