from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.logprobs import token_logprobs_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, assert_close_to_exact, generator, randn

NAN, INF = float("nan"), float("inf")
VOCABS = (1, 2, 3, 127, 128, 129, 1000, 9001)


def tokens(n: int, vocab: int, seed: int, device: str) -> Tensor:
    return torch.randint(vocab, (n,), generator=generator(seed)).to(device)


def plain_ranks(logits: Tensor, token_ids: Tensor) -> list[int]:
    return [
        1 + sum(logit > row[token] for logit in row)
        for row, token in zip(logits.tolist(), token_ids.tolist(), strict=True)
    ]


def plain_top(logits: Tensor, num_top: int) -> list[list[int]]:
    """Python's sort is stable, so of equals the lower id comes first."""
    return [sorted(range(len(row)), key=lambda i: -row[i])[:num_top] for row in logits.tolist()]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN equal to NaN."""
    return torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every new tensor is filled with NaN, or with the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def test_a_kernel_serves_the_cpu() -> None:
    assert (ops.served_by()["token_logprobs"]["CPU"] == "kernel") == (ops.build_info().kind != "reference")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_matches_float64(device: str, dtype: torch.dtype, vocab: int, seed: int) -> None:
    n = 5 if vocab > 5000 else 20
    scale = 8 * torch.rand(n, 1, generator=generator(seed)).to(device)
    logits = (randn(n, vocab, seed=seed + 1, dtype=torch.float32, device=device) * scale).to(dtype)
    token_ids = tokens(n, vocab, seed + 2, device)
    exact, in_torch = logits.double().log_softmax(-1), logits.float().log_softmax(-1)
    chosen = token_ids.unsqueeze(1)
    for num_top in sorted({0, 1, min(7, vocab), vocab}):
        logprobs, ranks, top_ids, top_logprobs = ops.token_logprobs(logits, token_ids, num_top)
        assert (logprobs.dtype, ranks.dtype) == (torch.float32, torch.int64) and ranks.device.type == device
        assert top_ids.shape == top_logprobs.shape == (n, num_top)
        assert_close_to_exact(logprobs, exact.gather(1, chosen).squeeze(1), in_torch.gather(1, chosen).squeeze(1))
        assert ranks.tolist() == plain_ranks(logits, token_ids)
        assert top_ids.tolist() == plain_top(logits, num_top)
        assert_close_to_exact(top_logprobs, exact.gather(1, top_ids), in_torch.gather(1, top_ids))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", ("ascending", "descending", "many ties", "one cluster", "far above 0", "far outliers")
)
def test_hard_rows(device: str, shape: str, seed: int) -> None:
    logits = randn(6, 777, seed=seed, dtype=torch.float32, device="cpu", scale=3.0)
    if shape in ("ascending", "descending"):
        logits = logits.sort(descending=shape == "descending").values
    elif shape == "many ties":
        logits.round_()  # zeros of both signs
    elif shape == "one cluster":
        logits = 20 + logits * 1e-6
    elif shape == "far above 0":
        logits += 1e4
    else:
        logits[:, ::3] = -1e30
        logits[:, 1::7] *= 1e-30
    logits, token_ids = logits.to(device), tokens(6, 777, seed + 1, device)
    logprobs, ranks, top_ids, top_logprobs = ops.token_logprobs(logits, token_ids, 50)
    assert ranks.tolist() == plain_ranks(logits, token_ids) and top_ids.tolist() == plain_top(logits, 50)
    exact = logits.double().log_softmax(-1)
    close = {"rtol": 1e-6, "atol": 1e-5}
    torch.testing.assert_close(logprobs.double(), exact.gather(1, token_ids.unsqueeze(1)).squeeze(1), **close)
    torch.testing.assert_close(top_logprobs.double(), exact.gather(1, top_ids), **close)


@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    logits = torch.tensor([0.1, 0.4, 0.1, 0.4], device=device).log().expand(3, 4)
    logprobs, ranks, top_ids, top_logprobs = ops.token_logprobs(logits, torch.tensor([3, 2, -5], device=device), 3)
    assert logprobs[:2].tolist() == pytest.approx([math.log(0.4), math.log(0.1)]) and logprobs[2].isnan()
    assert ranks.tolist() == [1, 3, 0]
    assert top_ids.tolist() == [[1, 3, 0]] * 3
    assert top_logprobs[2].tolist() == pytest.approx([math.log(p) for p in (0.4, 0.4, 0.1)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_masked_tokens(device: str, dtype: torch.dtype, seed: int) -> None:
    logits = torch.full((3, 200), -INF, dtype=dtype, device=device)
    logits[:, 70], logits[:, 150] = 1.0, 2.0
    logits[2, 70] = -INF
    logprobs, ranks, top_ids, top_logprobs = ops.token_logprobs(logits, torch.tensor([70, 5, 150], device=device), 4)
    likely, unlikely = -math.log1p(math.exp(-1)), -math.log1p(math.exp(1))
    assert logprobs.tolist() == pytest.approx([unlikely, -INF, 0.0]) and ranks.tolist() == [2, 3, 1]
    assert top_ids.tolist() == [[150, 70, 0, 1], [150, 70, 0, 1], [150, 0, 1, 2]]
    assert top_logprobs[1:].tolist() == [pytest.approx([likely, unlikely, -INF, -INF]), [0.0, -INF, -INF, -INF]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("vocab", "place"), ((7, 6), (200, 3), (200, 150)))
def test_rows_without_probabilities(device: str, dtype: torch.dtype, vocab: int, place: int, seed: int) -> None:
    logits, token_ids = randn(7, vocab, seed=seed, dtype=dtype, device=device), tokens(7, vocab, seed + 1, device)
    good = ops.token_logprobs(logits, token_ids, 3)
    logits[1, place], logits[3, place], logits[4], logits[5, place] = NAN, INF, -INF, -NAN
    bad = torch.tensor([1, 3, 4, 5], device=device)
    with poisoned_memory():
        got = ops.token_logprobs(logits, token_ids, 3)
    for tensor, before, filler in zip(got, good, (NAN, 0, -1, NAN), strict=True):
        assert same(tensor, before.index_fill(0, bad, filler))


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_logits(device: str) -> None:
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[largest, -largest, largest, 0.0]], device=device).expand(2, 4)
    logprobs, ranks, top_ids, top_logprobs = ops.token_logprobs(logits, torch.tensor([2, 1], device=device), 2)
    assert logprobs.tolist() == pytest.approx([-math.log(2), -INF]) and ranks.tolist() == [1, 4]
    assert top_ids.tolist() == [[0, 2]] * 2 and top_logprobs[0].tolist() == pytest.approx([-math.log(2)] * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_no_vocabulary(device: str) -> None:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    shapes = [tuple(t.shape) for t in ops.token_logprobs(torch.zeros(0, 50, device=device), none, 5)]
    assert shapes == [(0,), (0,), (0, 5), (0, 5)]
    shapes = [tuple(t.shape) for t in ops.token_logprobs(torch.zeros(0, 0, device=device), none, 0)]
    assert shapes == [(0,), (0,), (0, 0), (0, 0)]
    asked = torch.full((2,), -1, device=device)
    logprobs, ranks, top_ids, _ = ops.token_logprobs(torch.zeros(2, 0, device=device), asked, 0)
    assert logprobs.isnan().all() and ranks.tolist() == [0, 0] and top_ids.shape == (2, 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_row_depends_on_itself_alone(device: str, dtype: torch.dtype, seed: int) -> None:
    wide = randn(40, 1500, seed=seed, dtype=dtype, device=device, scale=2.0)
    logits, token_ids = wide[:, 3:1002], tokens(40, 999, seed + 1, device)  # strided rows that start at odd addresses
    before = wide.clone()
    together = ops.token_logprobs(logits, token_ids, 6)
    with poisoned_memory():
        again = ops.token_logprobs(logits.contiguous(), token_ids, 6)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    for r in (0, 17, 39):
        alone = ops.token_logprobs(logits[r : r + 1], token_ids[r : r + 1], 6)
        assert all(torch.equal(a, b[r : r + 1]) for a, b in zip(alone, together, strict=True))
    assert torch.equal(wide, before)


def test_threads_do_not_change_results(seed: int) -> None:
    logits, token_ids = randn(64, 5000, seed=seed, dtype=torch.float32, device="cpu"), tokens(64, 5000, seed, "cpu")
    several, threads = ops.token_logprobs(logits, token_ids, 20), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.token_logprobs(logits, token_ids, 20)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


# ---- the op as PyTorch sees it ----


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "logits dtype": ({"logits": torch.ones(4, 8, dtype=torch.float64)}, "logits has dtype"),
    "logits shape": ({"logits": torch.ones(8)}, r"logits has shape \[8\], expected \[n, vocab\]"),
    "column stride": ({"logits": torch.ones(8, 4).T}, "logits must be contiguous in its last dimension"),
    "token_ids dtype": ({"token_ids": torch.ones(4, dtype=torch.int32)}, "token_ids has dtype"),
    "token_ids shape": ({"token_ids": torch.ones(3).long()}, r"token_ids has shape \[3\], expected \[n\] with n=4"),
    "token_ids stride": ({"token_ids": torch.ones(8).long()[::2]}, "token_ids must be contiguous"),
    "num_top of -1": ({"num_top": -1}, "num_top is -1, expected 0 to 8"),
    "num_top beyond the vocabulary": ({"num_top": 9}, "num_top is 9, expected 0 to 8"),
    "a huge num_top": ({"num_top": 2**62}, f"num_top is {2**62}, expected 0 to 8"),
}


def moved(value: Any, device: str) -> Any:
    """A plain .to() would make a strided view contiguous on another device."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(device: str, case: str) -> None:
    change, message = BAD[case]
    arguments = {"logits": torch.ones(4, 8), "token_ids": torch.zeros(4).long(), "num_top": 2} | change
    with pytest.raises(RuntimeError, match=rf"minivllm::token_logprobs: {message}"):
        ops.token_logprobs(**{name: moved(value, device) for name, value in arguments.items()})


@pytest.mark.parametrize("bad", (8, 2**40))
@pytest.mark.parametrize("implementation", (ops.token_logprobs, token_logprobs_reference))
def test_a_token_beyond_the_vocabulary_is_an_error(bad: int, implementation: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match=f"minivllm::token_logprobs: token_ids holds {bad}, expected less than 8"):
        implementation(torch.ones(2, 8), torch.tensor([-1, bad]), 2)


# ---- what only the CUDA kernels can get wrong ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("num_top", (0, 1, 20, 1024, 1025))
def test_large_rows_are_the_cpu_kernels(dtype: torch.dtype, num_top: int, seed: int) -> None:
    logits = randn(9, 151_936, seed=seed, dtype=torch.float32, device="cpu", scale=3.0)
    logits[1] = 2.5  # ties, more than fit into shared memory
    logits[2].round_()
    logits[3, torch.rand(151_936, generator=generator(seed)) < 0.9999] = -INF
    logits[4] = logits[4].sort().values
    logits[5, 777] = NAN
    logits[6] *= 1e4
    logits, token_ids = logits.to(dtype), tokens(9, 151_936, seed + 1, "cpu")
    token_ids[7] = -1
    expected = ops.token_logprobs(logits, token_ids, num_top)
    with poisoned_memory():
        got = [tensor.cpu() for tensor in ops.token_logprobs(logits.cuda(), token_ids.cuda(), num_top)]
    assert torch.equal(got[1], expected[1]) and torch.equal(got[2], expected[2])
    for ours, theirs in ((got[0], expected[0]), (got[3], expected[3])):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=2e-6, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_results_do_not_depend_on_the_batch(dtype: torch.dtype, seed: int) -> None:
    logits = randn(300, 50_257, seed=seed, dtype=dtype, device="cuda", scale=2.0)
    token_ids = tokens(300, 50_257, seed + 1, "cuda")
    together = ops.token_logprobs(logits, token_ids, 5)
    for rows in (slice(0, 1), slice(40, 47), slice(100, 200)):  # cut into other numbers of blocks
        part = ops.token_logprobs(logits[rows], token_ids[rows], 5)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, together, strict=True))


@pytest.mark.gpu
def test_a_graph_replays_other_tokens(seed: int) -> None:
    logits = randn(5, 3000, seed=seed, dtype=torch.bfloat16, device="cuda")
    token_ids, static_logits = tokens(5, 3000, seed, "cuda"), logits.clone()
    ops.token_logprobs(static_logits, token_ids, 6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.token_logprobs(static_logits, token_ids, 6)
    for trial in range(3):
        token_ids.copy_(tokens(5, 3000, seed + trial, "cuda"))
        static_logits.copy_(logits.roll(trial, 1))
        graph.replay()
        expected = ops.token_logprobs(static_logits, token_ids, 6)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
