from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minivllm import ops
from minivllm.ops.penalties import apply_penalties_reference, count_tokens_reference
from tests.ops.support import DEVICES, FLOAT_DTYPES, assert_close_to_exact, generator, randn

NAN, INF = float("nan"), float("inf")
Sequence = tuple[list[int], list[int]]
NAMES = ("presence", "frequency", "repetition")


def sequences(num_states: int, vocab: int, seed: int) -> list[Sequence]:
    """A prompt and an output for each state, with tokens that come often, once or never."""
    draw = generator(seed)

    def tokens() -> list[int]:
        length = int(torch.randint(0, 30, (), generator=draw))
        return (torch.rand(length, generator=draw).square() * vocab).long().tolist()

    return [(tokens(), tokens()) for _ in range(num_states)]


def counts_of(states: list[Sequence], vocab: int, device: str) -> Tensor:
    """The table, marked and counted by hand."""
    counts = torch.zeros(len(states), vocab, dtype=torch.int32)
    for row, (prompt, output) in zip(counts, states, strict=True):
        row[list(set(prompt))] = 1
        for token, times in Counter(output).items():
            row[token] += 2 * times
    return counts.to(device)


def columns_of(values: Tensor, device: str) -> dict[str, Tensor]:
    return dict(zip(NAMES, values.to(device), strict=True))


def penalty_columns(n: int, seed: int, device: str) -> dict[str, Tensor]:
    """presence and frequency from -2 to 2, repetition from 0.1 to 2.1."""
    low, width = torch.tensor([[-2.0], [-2.0], [0.1]]), torch.tensor([[4.0], [4.0], [2.0]])
    return columns_of(low + width * torch.rand(3, n, generator=generator(seed)), device)


def neutral(n: int, device: str) -> dict[str, Tensor]:
    return columns_of(torch.tensor([[0.0], [0.0], [1.0]]).repeat(1, n), device)


def exact_penalties(
    logits: Tensor,
    states: list[Sequence],
    rows: list[int],
    of: list[int],
    columns: dict[str, Tensor],
) -> Tensor:
    """Float64, one token of one sequence at a time."""
    out = logits.double().cpu()
    presence, frequency, repetition = (columns[name].double().tolist() for name in NAMES)
    for i, (row, state) in enumerate(zip(rows, of, strict=True)):
        prompt, output = states[state]
        for token in set(prompt + output):
            logit = float(out[row, token])
            logit = logit / repetition[i] if logit > 0 else logit * repetition[i]
            out[row, token] = logit - frequency[i] * output.count(token) - presence[i] * (token in output)
    return out


def test_kernels_serve_the_cpu() -> None:
    for name in ("apply_penalties", "count_tokens"):
        assert (ops.served_by()[name]["CPU"] == "kernel") == (ops.build_info().kind != "reference")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("vocab", (1, 2, 63, 64, 65, 500, 4099))
def test_matches_a_plain_formula(device: str, dtype: torch.dtype, vocab: int, seed: int) -> None:
    states = sequences(6, vocab, seed)
    wide = randn(9, vocab + 5, seed=seed + 1, dtype=dtype, device=device, scale=4.0)
    logits, before = wide[:, 3 : vocab + 3], wide.clone()  # strided rows that start at odd addresses
    rows, of = [7, 0, 3, 5], [2, 5, 2, 0]
    columns = penalty_columns(4, seed + 2, device)
    exact = exact_penalties(logits, states, rows, of, columns)
    arguments = torch.tensor(rows, device=device), counts_of(states, vocab, device), torch.tensor(of, device=device)
    in_torch = logits.clone()
    apply_penalties_reference(in_torch, *arguments, **columns)
    ops.apply_penalties(logits, *arguments, **columns)
    assert_close_to_exact(logits.cpu(), exact, in_torch.cpu())
    for row, state in zip(rows, of, strict=True):  # what was not penalised is the same to the bit
        wide[row, [3 + token for token in {*states[state][0], *states[state][1]}]] = 0
        before[row, [3 + token for token in {*states[state][0], *states[state][1]}]] = 0
    assert torch.equal(wide, before)


@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device: str) -> None:
    logits = torch.tensor([[3.0, 3.0, 3.0, -3.0, -3.0, -3.0, 0.0, 1.0]], device=device)
    counts = torch.tensor([[0, 1, 2, 0, 1, 5, 6, 7]], dtype=torch.int32, device=device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    presence, frequency, repetition = torch.tensor([[0.5], [0.25], [2.0]], device=device)
    ops.apply_penalties(logits, first, counts, first, presence, frequency, repetition)
    assert logits.tolist() == [[3.0, 1.5, 0.75, -3.0, -6.0, -7.0, -1.25, -0.75]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_neutral_values_change_nothing(device: str, dtype: torch.dtype, seed: int) -> None:
    logits = randn(5, 300, seed=seed, dtype=dtype, device=device)
    logits[0, :2] = torch.tensor([-INF, -0.0], device=device)
    before = logits.clone()
    rows = torch.arange(5, device=device)
    ops.apply_penalties(logits, rows, counts_of(sequences(5, 300, seed), 300, device), rows, **neutral(5, device))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_masked_and_invalid_logits_stay_so(device: str, dtype: torch.dtype) -> None:
    logits = torch.tensor([[-INF, INF, NAN, 1.0]], dtype=dtype, device=device)
    counts = torch.full((1, 4), 3, dtype=torch.int32, device=device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    ops.apply_penalties(logits, first, counts, first, *torch.tensor([[1.5], [-1.0], [1.25]], device=device))
    low, high, bad, one = logits[0].tolist()
    assert low == -INF and high == INF and bad != bad and one == pytest.approx(0.3, rel=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_large_counts(device: str) -> None:
    logits = torch.zeros(1, 2, device=device)
    counts = torch.tensor([[2**31 - 1, 2**24]], dtype=torch.int32, device=device)
    first = torch.zeros(1, dtype=torch.int64, device=device)
    ops.apply_penalties(logits, first, counts, first, *torch.tensor([[0.0], [1.0], [1.0]], device=device))
    assert logits.tolist() == [[-(2.0**30), -(2.0**23)]]


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_and_no_vocabulary(device: str) -> None:
    none, some = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    logits, counts = torch.ones(3, 8, device=device), torch.ones(2, 8, dtype=torch.int32, device=device)
    ops.apply_penalties(logits, none, counts, none, **neutral(0, device))
    ops.count_tokens(counts, none, none)
    assert (logits == 1).all() and (counts == 1).all()
    ops.apply_penalties(logits[:, :0], some, counts[:, :0], some, **neutral(1, device))
    ops.count_tokens(counts[:, :0], some, some - 1)


def test_rows_do_not_depend_on_threads_or_neighbours(seed: int) -> None:
    states, threads = sequences(20, 3000, seed), torch.get_num_threads()
    logits = randn(20, 3000, seed=seed + 1, dtype=torch.float32, device="cpu")
    rows, counts, columns = torch.arange(20), counts_of(states, 3000, "cpu"), penalty_columns(20, seed + 2, "cpu")
    together, alone = logits.clone(), logits.clone()
    ops.apply_penalties(together, rows, counts, rows, **columns)
    try:
        torch.set_num_threads(1)
        for i in range(20):
            of_row = {name: column[i : i + 1] for name, column in columns.items()}
            ops.apply_penalties(alone, rows[i : i + 1], counts, rows[i : i + 1], **of_row)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)


# ---- counting ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", (1, 7, 1000))
def test_count_tokens(device: str, n: int, seed: int) -> None:
    table = torch.randint(0, 9, (5, 40), dtype=torch.int32, generator=generator(seed)).to(device)
    counts, before = table[1:, 3:33], table.clone()
    rows = torch.randint(4, (n,), generator=generator(seed + 1))
    tokens = torch.randint(-3, 30, (n,), generator=generator(seed + 2))
    ops.count_tokens(counts, rows.to(device), tokens.to(device))
    for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
        if token >= 0:
            before[1 + row, 3 + token] += 2
    assert torch.equal(table, before)


@pytest.mark.parametrize("device", DEVICES)
def test_counting_step_by_step_gives_the_table(device: str, seed: int) -> None:
    states = sequences(4, 50, seed)
    counts = counts_of([(prompt, []) for prompt, _ in states], 50, device)
    rows = torch.arange(4, device=device)
    for step in range(max(len(output) for _, output in states)):
        drawn = [output[step] if step < len(output) else -1 for _, output in states]
        ops.count_tokens(counts, rows, torch.tensor(drawn, device=device))
    assert torch.equal(counts, counts_of(states, 50, device))


# ---- the ops as PyTorch sees them ----


def good_arguments() -> dict[str, Any]:
    return {
        "logits": torch.ones(4, 8),
        "row_indices": torch.tensor([3, 1]),
        "counts": torch.ones(5, 8, dtype=torch.int32),
        "count_indices": torch.tensor([4, 4]),
        "presence": torch.ones(2),
        "frequency": torch.ones(2),
        "repetition": torch.ones(2),
    }


BAD: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "logits dtype": ("logits", lambda t: t.double(), "logits has dtype"),
    "logits shape": ("logits", lambda t: t[0], r"logits has shape \[8\], expected \[num_rows, vocab\]"),
    "column stride": ("logits", lambda t: torch.ones(8, 4).T, "logits must be contiguous in its last dimension"),
    "row_indices dtype": ("row_indices", lambda t: t.int(), "row_indices has dtype"),
    "row_indices shape": ("row_indices", lambda t: t[None], r"row_indices has shape \[1, 2\], expected \[n\]"),
    "counts dtype": ("counts", lambda t: t.long(), "counts has dtype"),
    "counts of another vocabulary": ("counts", lambda t: t[:, :7], r"counts has shape \[5, 7\].*vocab=8"),
    "count_indices dtype": ("count_indices", lambda t: t.int(), "count_indices has dtype"),
    "count_indices shape": ("count_indices", lambda t: t[:1], r"count_indices has shape \[1\], expected \[n\]"),
    "presence dtype": ("presence", lambda t: t.half(), "presence has dtype"),
    "presence shape": ("presence", lambda t: t[:1], r"presence has shape \[1\]"),
    "frequency dtype": ("frequency", lambda t: t.double(), "frequency has dtype"),
    "frequency shape": ("frequency", lambda t: t.repeat(2), r"frequency has shape \[4\]"),
    "repetition dtype": ("repetition", lambda t: t.int(), "repetition has dtype"),
    "repetition stride": ("repetition", lambda t: torch.ones(4)[::2], "repetition must be contiguous"),
}


def moved(arguments: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """A plain .to() would make a strided view contiguous on another device."""
    return {
        name: torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device).copy_(value)
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(device: str, case: str) -> None:
    name, change, message = BAD[case]
    arguments = good_arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=f"minivllm::apply_penalties: {message}"):
        ops.apply_penalties(**moved(arguments, device))


BAD_COUNTING: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "counts dtype": ("counts", lambda t: t.long(), "counts has dtype"),
    "counts shape": ("counts", lambda t: t[0], r"counts has shape \[8\], expected \[num_states, vocab\]"),
    "count_indices dtype": ("count_indices", lambda t: t.int(), "count_indices has dtype"),
    "token_ids dtype": ("token_ids", lambda t: t.int(), "token_ids has dtype"),
    "token_ids shape": ("token_ids", lambda t: t[:1], r"token_ids has shape \[1\], expected \[n\] with .*n=2"),
}


def good_counting() -> dict[str, Any]:
    arguments = good_arguments()
    return {"counts": arguments["counts"], "count_indices": torch.tensor([4, 0]), "token_ids": torch.tensor([7, -1])}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", BAD_COUNTING)
def test_bad_input_of_counting_is_named(device: str, case: str) -> None:
    name, change, message = BAD_COUNTING[case]
    arguments = good_counting()
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=f"minivllm::count_tokens: {message}"):
        ops.count_tokens(**moved(arguments, device))


@pytest.mark.parametrize(
    ("name", "bad", "wanted"),
    (
        ("row_indices", 4, "less than 4"),
        ("row_indices", -1, "at least 0"),
        ("count_indices", 2**40, "less than 5"),
        ("count_indices", -(2**63), "at least 0"),
    ),
)
@pytest.mark.parametrize("implementation", (ops.apply_penalties, apply_penalties_reference))
def test_an_index_out_of_range_is_an_error_and_writes_nothing(
    name: str, bad: int, wanted: str, implementation: Callable[..., None]
) -> None:
    arguments = good_arguments()
    arguments[name][1] = bad
    with pytest.raises(RuntimeError, match=f"minivllm::apply_penalties: {name} holds {bad}, expected {wanted}"):
        implementation(**arguments)
    assert (arguments["logits"] == 1).all()


@pytest.mark.parametrize(
    ("name", "bad", "wanted"),
    (("token_ids", 8, "less than 8"), ("count_indices", 5, "less than 5"), ("count_indices", -1, "at least 0")),
)
@pytest.mark.parametrize("implementation", (ops.count_tokens, count_tokens_reference))
def test_counting_out_of_range_is_an_error_and_writes_nothing(
    name: str, bad: int, wanted: str, implementation: Callable[..., None]
) -> None:
    arguments = good_counting()
    arguments[name][1] = bad
    with pytest.raises(RuntimeError, match=f"minivllm::count_tokens: {name} holds {bad}, expected {wanted}"):
        implementation(**arguments)
    assert (arguments["counts"] == 1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_large_rows_are_the_cpu_kernels(dtype: torch.dtype, seed: int) -> None:
    vocab, states = 50_257, sequences(4, 50_257, seed)
    logits = randn(6, vocab, seed=seed, dtype=dtype, device="cpu", scale=3.0)
    rows, of, columns = torch.tensor([5, 0, 3]), torch.tensor([3, 1, 3]), penalty_columns(3, seed + 1, "cpu")
    counts = counts_of(states, vocab, "cpu")
    got = logits.cuda()
    ops.apply_penalties(got, rows.cuda(), counts.cuda(), of.cuda(), **{k: v.cuda() for k, v in columns.items()})
    ops.apply_penalties(logits, rows, counts, of, **columns)
    torch.testing.assert_close(got.cpu(), logits)


@pytest.mark.gpu
def test_a_state_beyond_2_to_the_31_counts() -> None:
    vocab, num_states = 151_936, 14_200  # 8.6 GB
    counts = torch.zeros(num_states, vocab, dtype=torch.int32, device="cuda")
    last, token = torch.tensor([num_states - 1], device="cuda"), torch.tensor([vocab - 1], device="cuda")
    for _ in range(3):
        ops.count_tokens(counts, last, token)
    logits = torch.zeros(1, vocab, device="cuda")
    ops.apply_penalties(logits, last - last, counts, last, *torch.tensor([[0.5], [0.25], [1.0]], device="cuda"))
    assert logits[0, -1] == -1.25 and logits.count_nonzero() == 1 and counts.sum() == 6
