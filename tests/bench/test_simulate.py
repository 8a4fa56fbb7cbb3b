"""The simulator: times computed by hand, ideal hit rates, nothing lost or kept, and its command line."""

from __future__ import annotations

import gc
import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from minivllm.request import Request

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import simulate
from simulation.cost import PRESETS, CostModel
from simulation.loop import Simulation
from simulation.result import Result, Sample, Timeline
from simulation.settings import Settings
from simulation.workload import Arrival, Given, Synthetic, Turn, Workload, parse_lengths

COST = CostModel(fixed=1.0, row=0.1, token=0.01, kv=0.001, pair=0.0001)
SECOND = CostModel(fixed=1.0)


def run(workload: Workload, **options: Any) -> Result:
    options = {"num_blocks": 512, "max_num_seqs": 64, "max_num_batched_tokens": 512, "cost": SECOND, **options}
    return Simulation("test", Settings(**options), workload, check_every=1).run()


def given(*requests: tuple[float, int, int]) -> Given:
    """(time, prompt length, answer length), prompts without a common beginning."""
    return Given(
        listed=[Arrival(time, [(2 + index, prompt)], answer) for index, (time, prompt, answer) in enumerate(requests)]
    )


def synthetic(total: int, prompt: str = "10", answer: str = "4", **options: Any) -> Synthetic:
    return Synthetic(
        total=total, prompt=parse_lengths("prompt", prompt), answer=parse_lengths("answer", answer), **options
    )


def test_one_request_takes_what_the_cost_model_says() -> None:
    result = run(given((0.0, 10, 4)), cost=COST)
    first = 1.0 + 10 * 0.01 + 55 * 0.0001
    later = [1.0 + 0.1 + cached * 0.001 for cached in (11, 12, 13)]
    assert list(result.ttft) == pytest.approx([first])
    assert list(result.tpot) == pytest.approx([sum(later) / 3])
    assert list(result.end_to_end) == pytest.approx([first + sum(later)])
    assert list(result.queueing) == [0.0]
    assert (result.steps, result.rows, result.computed_tokens, result.answer_tokens) == (4, 4, 13, 4)
    assert result.makespan_s == result.busy_s == pytest.approx(first + sum(later))


def test_a_prompt_beyond_the_budget_comes_in_chunks() -> None:
    result = run(given((0.0, 10, 1)), cost=COST, max_num_seqs=4, max_num_batched_tokens=4)
    pairs = 10 + (4 * 4 + 10) + (2 * 8 + 3)
    assert list(result.ttft) == pytest.approx([3 * 1.0 + 10 * 0.01 + pairs * 0.0001])
    assert (result.steps, list(result.tpot)) == (3, [])


def test_a_request_without_a_slot_waits_for_the_one_before() -> None:
    result = run(given((0.0, 5, 2), (0.0, 5, 2), (0.5, 5, 2)), max_num_seqs=1)
    assert list(result.queueing) == pytest.approx([0.0, 2.0, 3.5])
    assert list(result.ttft) == pytest.approx([1.0, 3.0, 4.5])
    assert list(result.end_to_end) == pytest.approx([2.0, 4.0, 5.5])


@pytest.mark.parametrize(("depth", "step"), [(1, 1.25), (2, 1.0)])
def test_a_step_in_flight_hides_the_scheduler(depth: int, step: float) -> None:
    result = run(given((0.0, 5, 4)), depth=depth, scheduler_us=250_000.0)
    assert list(result.ttft) == pytest.approx([1.25])
    assert list(result.tpot) == pytest.approx([step])


def test_nothing_happens_between_arrivals() -> None:
    result = run(given((0.0, 5, 1), (100.0, 5, 1)), speed_up=4.0)
    assert list(result.ttft) == pytest.approx([1.0, 1.0])
    assert (result.makespan_s, result.busy_s) == (26.0, 2.0)


def test_concurrency_lets_a_request_in_when_one_ends() -> None:
    result = run(given(*[(0.0, 5, 2)] * 3), concurrency=1)
    assert list(result.ttft) == pytest.approx([1.0] * 3)
    assert result.makespan_s == 6.0


def test_a_shared_prefix_is_computed_once_a_group() -> None:
    load = synthetic(12, prompt="20", shared_prefix=64, groups=3)
    result = run(load, concurrency=1)
    assert (result.prompt_tokens, result.cached_tokens) == (12 * 84, 9 * 64)
    at_once = run(load)
    assert at_once.cached_tokens == 9 * 64, "others wait for the group's first instead of computing it again"
    assert run(load, prefix_aware=False, max_num_batched_tokens=2048).cached_tokens == 0
    assert run(load, prefix_caching=False, concurrency=1).cached_tokens == 0


def test_the_next_turn_of_a_chat_finds_prompt_and_answer() -> None:
    chat = Arrival(0.0, [(2, 30)], 20, later=[Turn(9, 5, 4.0), Turn(7, 3, 0.5)], token=2)
    result = run(Workloads(chat), cost=SECOND)
    second, third = 30 + 20 + 7, 30 + 20 + 7 + 3 + 9
    cached = (30 + 20 - 1) // 16 * 16 + (second + 3 - 1) // 16 * 16  # the last token of an answer is never computed
    assert (result.prompt_tokens, result.cached_tokens) == (30 + second + third, cached)
    assert result.makespan_s == pytest.approx(20 + 0.5 + 3 + 4.0 + 5)
    assert list(result.ttft) == pytest.approx([1.0, 1.0, 1.0])


class Workloads:
    """One chat as a workload."""

    def __init__(self, chat: Arrival) -> None:
        self._chat = chat
        self.total = 1 + len(chat.later or ())

    def arrivals(self) -> Any:
        return iter([self._chat])


@pytest.mark.parametrize(("preset", "expected"), [("qwen3-0.6b-h200", 30_800), ("qwen3-8b-h200", 10_800)])
def test_presets_give_the_tokens_a_second_they_were_derived_from(preset: str, expected: int) -> None:
    rng = random.Random(0)
    prompts = [len([rng.randint(0, 10_000) for _ in range(rng.randint(100, 1024))]) for _ in range(256)]
    load = given(*((0.0, prompt, rng.randint(100, 1024)) for prompt in prompts))
    settings = Settings(cost=PRESETS[preset], num_blocks=20_000, max_num_seqs=256, max_num_batched_tokens=16_384)
    result = Simulation(preset, settings, load).run()
    assert result.answer_tokens == 133_966
    assert result.answer_tokens / result.makespan_s == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("foreseen", [True, False])
def test_every_request_ends_once_and_tokens_add_up(seed: int, depth: int, foreseen: bool) -> None:
    load = synthetic(
        150, prompt="uniform:1:120", answer="exponential:20", rate=0.5, shared_prefix=24, groups=3, turns=3, seed=seed,
        priorities=3,
    )  # fmt: skip
    answers = [arrival.answer for arrival in load.arrivals()]
    answers += [turn.answer for arrival in load.arrivals() for turn in arrival.later or ()]
    result = run(
        load, depth=depth, max_tokens=None if foreseen else 400, num_blocks=64, max_num_seqs=8, policy="priority",
        max_num_batched_tokens=64,
    )  # fmt: skip
    assert sum(result.ends.values()) + result.impossible + result.unsent == 150
    if not result.impossible:
        assert result.answer_tokens == sum(answers)
    assert len(result.ttft) == len(result.end_to_end) == len(result.priorities) == sum(result.ends.values())
    assert result.checks > result.steps


def test_an_unforeseen_end_costs_one_token_with_a_step_in_flight() -> None:
    load = given((0.0, 5, 4))
    steps = [run(load, max_tokens=tokens, depth=depth).steps for depth in (1, 2) for tokens in (None, 100)]
    assert steps == [4, 4, 4, 5]


def test_too_little_room_for_unforeseen_answers_preempts() -> None:
    result = run(given(*[(0.0, 16, 5)] * 40, *[(50.0, 16, 150)] * 6), max_tokens=160, num_blocks=20)
    assert result.preemptions > 0
    assert result.answer_tokens == 40 * 5 + 6 * 150


def test_refused_impossible_and_late_requests_are_counted() -> None:
    load = given(*[(0.0, 5, 3)] * 4)
    assert run(load, max_num_seqs=1, max_num_waiting=2).refused == 2
    result = run(given((0.0, 5, 3), (0.0, 90, 3)), num_blocks=4)
    assert (result.impossible, result.ends) == (1, Counter(length=1))
    late = run(load, max_num_seqs=1, timeout_s=4.5)
    assert late.ends == Counter(length=1, timeout=3)
    assert (late.answer_tokens, len(late.ttft)) == (3 + 2, 1)


def test_a_chat_that_breaks_off_sends_no_more() -> None:
    result = run(synthetic(6, prompt="30", answer="10", turns=3), num_blocks=4)
    assert (result.ends, result.impossible, result.unsent) == (Counter(length=2), 2, 2)


def test_variants_do_not_change_each_others_workload() -> None:
    load = given((0.0, 5, 2), (64.0, 5, 2))
    spans = [run(load, speed_up=factor).makespan_s for factor in (2.0, 4.0, 2.0)]
    assert spans == [34.0, 18.0, 34.0]


def test_ended_requests_are_not_kept() -> None:
    counts = []

    def count(ended: int) -> None:
        if ended % 40 == 0:
            counts.append(sum(type(thing) is Request for thing in gc.get_objects()))

    settings = Settings(num_blocks=512, max_num_seqs=8, max_num_batched_tokens=512, concurrency=16, cost=SECOND)
    before = sum(type(thing) is Request for thing in gc.get_objects())
    Simulation("test", settings, synthetic(400), on_end=count).run()
    assert len(counts) >= 5
    assert max(counts) - before <= 16 + 8


def test_a_timeline_stays_short_and_even(seed: int) -> None:
    steps = random.Random(seed).randint(100, 3000)
    timeline = Timeline(limit=32)
    for step in range(steps):
        if timeline.wants(step):
            timeline.add(Sample(float(step), step, 0, 0.0, 0.0))
    kept = [sample.running for sample in timeline.samples]
    assert kept == list(range(0, steps, timeline.stride))
    assert len(kept) <= 32


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(simulate.main, arguments)


SMALL = ("--requests", "20", "--prompt-tokens", "30", "--answer-tokens", "uniform:2:9", "--num-blocks", "200")


def test_the_command_reports_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = invoke(*SMALL, "--variant", "one:", "--variant", "two:num_blocks=50,depth=2", "--json", str(file))
    assert done.exit_code == 0, done.output
    assert "TTFT, s: mean" in done.output
    one, two = json.loads(file.read_text())
    assert (one["name"], one["settings"]["num_blocks"], two["settings"]["num_blocks"]) == ("one", 200, 50)
    assert one["requests"]["length"] == two["requests"]["length"] == 20
    assert one["ttft_s"]["p50"] <= one["ttft_s"]["p99"] <= one["end_to_end_s"]["p99"]
    assert len(one["peak_rss_mib"]) >= 2


def test_the_command_compares_policies_on_the_priorities_that_it_gives() -> None:
    done = invoke(*SMALL, "--compare", "fcfs,priority", "--priorities", "2")
    assert done.exit_code == 0, done.output
    assert "of priority 1" in done.output


def test_the_command_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "out.png"
    done = invoke(*SMALL, "--plot", str(file))
    assert done.exit_code == 0, done.output
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--policy", "best"), "policy"),
        (("--variant", "a:depht=2"), "depth"),
        (("--variant", "a:depth=two"), "depth"),
        (("--block-size", "17"), "block_size"),
        (("--max-num-batched-tokens", "8"), "max_num_batched_tokens"),
        (("--cost", "qwen"), "cost"),
        (("--rate", "-1"), "rate"),
        (("--prompt-tokens", "normal:1:2"), "prompt_tokens"),
        (("--limit", "5"), "--limit"),
        (("--trace", __file__, "--rate", "5"), "--rate"),
        (("--trace", __file__), "ending"),
        (("--compare", "fcfs,priority", "--record", "out.json"), "--record"),
        (("--json", "no/such/folder.json"), "folder"),
        (("--fit", __file__, "--cost", "row=1"), "--cost"),
        (("--check-every", "-1"), "--check-every"),
        (("--trace", "none.csv"), "none.csv"),
    ],
)
def test_bad_options_are_named(arguments: tuple[str, ...], word: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code != 0
    assert "Error" in done.output
    assert word in done.output
