"""What the simulator is fed: traces, synthetic load, cost models, and fits of recorded runs."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from minivllm.batch import Batch
from minivllm.errors import ConfigError
from minivllm.trace import TraceWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

from simulation.cost import COEFFICIENTS, PRESETS, CostModel, StepLoad, load_of, parse_cost
from simulation.fit import fit, fit_file, non_negative_least_squares
from simulation.loop import Simulation
from simulation.settings import Settings, parse_variant
from simulation.traces import parse_time, read_trace
from simulation.workload import Synthetic, parse_lengths

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def test_an_azure_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(HEADER + "2023-11-16 18:16:00.5000000,374,44\n2023-11-16 18:15:59.2500001,3,1\n")
    first, second = read_trace(file).listed
    assert (first.time, len(first.prompt_token_ids()), first.answer) == (0.0, 3, 1)
    assert (second.time, len(second.prompt_token_ids()), second.answer) == (pytest.approx(1.25), 374, 44)
    assert not set(first.prompt_token_ids()) & set(second.prompt_token_ids())
    assert read_trace(file, limit=1).total == 1


def test_the_whole_azure_trace(data_dir: Path) -> None:
    trace = read_trace(data_dir / "workloads" / "AzureLLMInferenceTrace_conv.csv")
    times = [arrival.time for arrival in trace.listed]
    assert (trace.total, times[0]) == (19_366, 0.0)
    assert times == sorted(times)
    assert 3500 < times[-1] < 3502
    assert sum(arrival.answer for arrival in trace.listed) == 4_088_665


def test_times_in_every_spelling() -> None:
    moments = ["2023-11-16 18:15:46.6805900", "2023-11-16T18:15:46.68059Z", "2023-11-16 19:15:46.68059+01:00"]
    assert {round(parse_time(moment), 5) for moment in moments} == {1700158546.68059}
    assert parse_time("12.5") == 12.5


def test_a_mooncake_trace_shares_what_its_hashes_share(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 3000, "input_length": 25, "output_length": 4, "hash_ids": [7, 2**60, "x"]},
        {"timestamp": 3500, "input_length": 28, "output_length": 5, "hash_ids": [7, 2**60], "priority": 2},
        {"timestamp": 4000, "input_length": 6, "output_length": 6},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    listed = read_trace(file, hash_block_tokens=10).listed
    first, second, third = (arrival.prompt_token_ids() for arrival in listed)
    assert [len(ids) for ids in (first, second, third)] == [25, 28, 6]
    assert first[:20] == second[:20]
    assert not set(first[20:]) & set(second[20:])
    assert first[9] != first[10]
    assert not set(third) & {*first, *second}
    assert [(arrival.time, arrival.priority) for arrival in listed] == [(0.0, 0), (0.5, 2), (1.0, 0)]


@pytest.mark.parametrize(
    "line", ["1,2", "1,2,x", "1,0,5", "1,5,0", "1,5,-3", "yesterday,1,1", "nan,1,1", "1,99999999999999999999,1", ""]
)
def test_a_bad_csv_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(f"{HEADER}0,1,1\n{line}\n2,1,1\n")
    with pytest.raises(ConfigError, match=r"trace\.csv, line 3: "):
        read_trace(file)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"timestamp": 1, "input_length": 5}',
        '{"timestamp": "1", "input_length": 5, "output_length": 1}',
        '{"timestamp": 1, "input_length": 5.5, "output_length": 1}',
        '{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}',
        '{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [[1]]}',
        '{"timestamp": 1, "input_length": 5, "output_length": 1, "hashes": [1]}',
        '{"timestamp": 1, "input_length": 5, "output_length": 1, "priority": -1}',
        "[" * 100_000,
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1}\n\n' + line)
    with pytest.raises(ConfigError, match=r"trace\.jsonl, line 3: "):
        read_trace(file)


def test_files_that_are_no_traces(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", b"time,in,out\n", "line 1: the columns"),
        ("b.csv", HEADER.encode(), "holds no requests"),
        ("c.jsonl", b"\xff\xfe", "line 1"),
        ("d.txt", b"", "ending"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_trace(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "mean"), [("100", 100), ("uniform:10:30", 20), ("exponential:50", 50.5), ("lognormal:100:0.5", 113.3)]
)
def test_lengths_are_drawn_as_said(seed: int, text: str, mean: float) -> None:
    rng, draw = random.Random(seed), parse_lengths("prompt", text)
    values = [draw(rng) for _ in range(20_000)]
    assert sum(values) / len(values) == pytest.approx(mean, rel=0.05)
    assert min(values) >= 1


@pytest.mark.parametrize("text", ["", "x", "0", "uniform:5", "uniform:9:5", "lognormal:5:x", "exponential:inf", "1:2"])
def test_bad_lengths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="prompt"):
        parse_lengths("prompt", text)


def test_synthetic_load_repeats_and_arrives_at_its_rate(seed: int) -> None:
    draw = parse_lengths("prompt", "uniform:1:50")
    load = Synthetic(total=5000, prompt=draw, answer=draw, rate=20.0, turns=2, think=1.0, priorities=3, seed=seed)
    first, again = list(load.arrivals()), list(load.arrivals())
    assert first == again
    assert len(first) == 2500
    assert first[-1].time == pytest.approx(2500 / 20, rel=0.15)
    assert {arrival.priority for arrival in first} == {0, 1, 2}
    assert len({arrival.token for arrival in first}) == 2500


def test_the_load_of_a_batch_counts_pairs_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    decodes = [rng.randrange(1, 300) for _ in range(rng.randrange(5))]
    chunks = [(rng.randrange(100), rng.randrange(1, 40)) for _ in range(rng.randrange(5))]
    batch = Batch(
        slots=list(range(len(decodes) + len(chunks))),
        starts=decodes + [start for start, _ in chunks],
        lengths=[1] * len(decodes) + [length for _, length in chunks],
        token_counts=[0] * len(decodes) + [length for _, length in chunks],
    )
    pairs = sum(1 for start, length in chunks for query in range(start, start + length) for _ in range(query + 1))
    kv = sum(len(range(position + 1)) for position in decodes)
    assert load_of(batch) == StepLoad(len(decodes), sum(length for _, length in chunks), kv, pairs)


def test_cost_is_given_by_name_by_terms_or_both() -> None:
    assert parse_cost("qwen3-8b-h200") == PRESETS["qwen3-8b-h200"]
    assert parse_cost("fixed=1e-3,kv=2") == CostModel(fixed=1e-3, kv=2.0)
    mixed = parse_cost("qwen3-8b-h200,row=0")
    assert (mixed.row, mixed.kv) == (0.0, PRESETS["qwen3-8b-h200"].kv)
    assert parse_cost(str(CostModel(fixed=0.125, pair=3e-10))) == CostModel(fixed=0.125, pair=3e-10)
    for bad in ("", "fixed=x", "fixd=1", "row=-1", "row=nan", "qwen3-8b-h200,qwen3-8b-h200"):
        with pytest.raises(ConfigError, match="cost"):
            parse_cost(bad)


def test_variants_change_what_they_name() -> None:
    base = Settings(num_blocks=77)
    name, settings = parse_variant("big:prefix_aware=0,max_tokens=none,speed_up=2.5,cost=qwen3-8b-h200", base)
    assert (name, settings.num_blocks, settings.prefix_aware, settings.speed_up) == ("big", 77, False, 2.5)
    assert (settings.max_tokens, settings.cost) == (None, PRESETS["qwen3-8b-h200"])
    assert parse_variant("same:", base) == ("same", base)


def random_loads(rng: random.Random, steps: int) -> list[StepLoad]:
    loads = []
    for _ in range(steps):
        rows, tokens = rng.randrange(65), rng.choice([0, 0, rng.randrange(1, 2000)])
        loads.append(StepLoad(rows, tokens, rows * rng.randrange(1, 2000), tokens * rng.randrange(1, 2000)))
    return loads


def test_a_fit_finds_the_coefficients_again(seed: int) -> None:
    rng = random.Random(seed)
    cost = CostModel(**{name: 10 ** rng.uniform(-9, -2) for name in COEFFICIENTS})
    loads = random_loads(rng, 400)
    found = fit(loads, [cost.seconds(load) for load in loads])
    for name in COEFFICIENTS:
        assert getattr(found.cost, name) == pytest.approx(getattr(cost, name), rel=1e-4), name
    assert found.p90_error < 1e-6
    assert found.predicted_s == pytest.approx(found.seconds)


def test_a_fit_of_noisy_steps_tells_its_error(seed: int) -> None:
    rng = random.Random(seed)
    cost, loads = PRESETS["qwen3-0.6b-h200"], random_loads(rng, 2000)
    found = fit(loads, [cost.seconds(load) * rng.uniform(0.9, 1.1) for load in loads])
    assert found.cost.fixed == pytest.approx(cost.fixed, rel=0.15)
    assert found.cost.kv == pytest.approx(cost.kv, rel=0.15)
    assert 0.03 < found.median_error < 0.08


def test_least_squares_stays_at_or_above_zero_and_is_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix, target = rng.normal(size=(30, 4)), rng.normal(size=30)
    best = non_negative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ best - target)
    assert np.all(best >= 0)
    assert np.all(gradient >= -1e-9), "growing a coefficient would help"
    assert np.all(np.abs(gradient[best > 0]) < 1e-9), "a positive coefficient is not at its best"


def test_a_fit_needs_steps() -> None:
    with pytest.raises(ConfigError, match="0 steps"):
        fit([], [])


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("max_tokens", [None, 60])
def test_a_recorded_run_gives_its_cost_back(tmp_path: Path, seed: int, depth: int, max_tokens: int | None) -> None:
    lengths = parse_lengths("prompt", "uniform:5:200"), parse_lengths("answer", "uniform:1:40")
    load = Synthetic(total=300, prompt=lengths[0], answer=lengths[1], rate=100.0, shared_prefix=32, seed=seed)
    cost = CostModel(fixed=1e-3, row=1e-4, token=1e-4, kv=1e-6, pair=1e-6)
    settings = Settings(
        cost=cost, num_blocks=150, max_num_seqs=16, max_num_batched_tokens=128, depth=depth, scheduler_us=50.0,
        max_tokens=max_tokens,
    )  # fmt: skip
    file = tmp_path / "run.json"
    result = Simulation("recorded", settings, load, record=file).run()
    found = fit_file(file)
    assert (found.steps, found.skipped) == (result.steps, 0)
    assert found.host_us == pytest.approx(50.0, abs=0.2)
    assert found.seconds == pytest.approx(result.busy_s, rel=1e-3)
    for name in COEFFICIENTS:
        assert getattr(found.cost, name) == pytest.approx(getattr(cost, name), rel=0.02), name


def test_a_file_without_steps_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    writer = TraceWriter(file)
    writer.event("queued", "a", {"prompt_tokens": 3, "max_tokens": 5})
    writer.close()
    with pytest.raises(ConfigError, match="0 steps"):
        fit_file(file)
    file.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="no trace"):
        fit_file(file)
