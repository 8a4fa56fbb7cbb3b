"""The pictures: small traces cell by cell, their figures, and hostile names at every width."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from minivllm.trace import StepRecord
from minivllm.trace_frame import ASCII, UNICODE, Marks
from minivllm.trace_reader import Preemption, RequestTrace, Span, Trace, read_trace
from minivllm.trace_view import draw, plain
from tests.trace_world import HOSTILE_IDS, TracedWorld


def picture(
    trace: Trace, *, rows: int = 24, sort: str = "arrival", width: int = 80, marks: Marks = UNICODE
) -> list[str]:
    console = Console(width=width, file=io.StringIO(), highlight=False, color_system=None)
    for part in draw(trace, rows=rows, sort=sort, width=width, marks=marks):
        console.print(part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue().split("\n")


def chart(lines: list[str], label: str) -> str:
    """The cells of the chart's row with this label."""
    [row] = [line for line in lines if re.match(rf" *{re.escape(label)} *│", line)]
    return row.split("│")[1]


def request(label: str, *spans: Span, first_token: float | None = None) -> RequestTrace:
    return RequestTrace(label, spans[0].begin, spans[-1].end, 12, list(spans), 4, first_token, "stop", 5)


def a_step(begin: float, end: float, blocks: tuple[int, int, int] = (1, 1, 2), running: int = 1) -> StepRecord:
    long = end - begin
    times = (begin, begin + long / 8, begin + long / 4, begin + long / 2, end)
    return StepRecord(*times, 3, 1, 7, running, 2, *blocks)


def test_a_small_trace_cell_by_cell() -> None:
    spans = [Span("queued", 0, 2), Span("prefill", 2, 3), Span("decode", 3, 6), Span("preempted", 6, 8)]
    first = request("r0", *spans, Span("prefill", 8, 9), Span("decode", 9, 10), first_token=3)
    second = request("r1", Span("queued", 4, 5), Span("decode", 5, 5))
    steps = [a_step(0, 2.5, (4, 0, 4)), a_step(2.5, 5, (0, 8, 0)), a_step(5, 7.5, (8, 0, 0)), a_step(7.5, 10)]
    trace = Trace(0, 10, steps, [first, second])
    lines = picture(trace, width=80)
    size = len(chart(lines, "r0"))
    assert size == 40, "the test wants columns of a quarter second"
    assert chart(lines, "r0") == "·" * 8 + "▒" * 4 + "█" * 12 + "x" * 8 + "▒" * 4 + "█" * 4
    assert chart(lines, "r1") == " " * 16 + "····█" + " " * 19
    assert "      3.00 s   10.0 s       5" in next(line for line in lines if line.startswith("r0"))
    assert "           -   1.00 s       5" in next(line for line in lines if line.startswith("r1"))
    blocks = lines.index(next(line for line in lines if line.startswith("blocks of the KV cache")))
    rows = [line.split("│")[1] for line in lines[blocks + 1 : blocks + 9]]
    assert rows[0] == " " * 10 + "·" * 10 + "▒" * 10 + "█" * 10
    assert rows[3] == " " * 10 + "·" * 10 + "▒" * 10 + "█" * 10
    assert rows[4] == rows[7] == " " * 10 + "█" * 10 + "▒" * 10 + "█" * 10
    assert [line.split("│")[2].strip() for line in lines[blocks + 1 : blocks + 4]] == [
        "used up to 8", "cached up to 8", "free down to 0",
    ]  # fmt: skip
    assert lines[blocks + 9].count("┬") == 2
    assert [lines[blocks + 10].index(label) for label in ("0", "5 s")] == [10, 30]
    assert chart(lines, "running") == " " * 10 + "█" * 30
    assert chart(lines, "tokens/s") == "█" * 40


def test_few_blocks_are_seen_in_a_large_cache() -> None:
    lines = picture(Trace(0, 10, [a_step(0, 0, (1, 2, 997)), a_step(5, 5, (0, 1, 999))]))
    begin = next(index for index, line in enumerate(lines) if line.startswith("blocks of the KV cache"))
    rows = [line.split("│")[1] for line in lines[begin + 1 : begin + 9]]
    half = len(rows[0]) // 2
    assert [row[0] for row in rows] == [*"······▒█"]
    assert [row[half + 1] for row in rows] == [*"·······▒"]
    assert lines[begin + 1].split("│")[0].strip() == "1,000"


def test_summary_and_tables() -> None:
    one = request("r0", Span("queued", 0, 1))
    other = RequestTrace("r1", 0, 9, 24, [Span("queued", 0, 9)])
    steps = [a_step(0, 1), a_step(2, 6), a_step(4, 8)]
    why = "4 decoding requests need a block and 3 are left"
    trace = Trace(0, 10, steps, [one, other], [Preemption(5, "r0", 1234, why)], 2, 17, "cut short")
    text = "\n".join(line.rstrip() for line in picture(trace, width=120))
    for words in (
        "10.0 s, 70.0% of it in 3 steps",
        "4.00 s (median), 4.00 s (p99), 4.00 s (longest)",
        "schedule 12.5%, launch 12.5%, wait 25.0%, update 50.0%",
        "21 tokens of prompts, 9 of decode rows: 3.00 tokens/s",
        "2: 1 stop, 1 unfinished",
        "33.3% of the prompt tokens (4 of 12) were cached; 2 waits for another's prefix",
        "1; they had computed 1,234 tokens",
        "17 blocks",
        "cut short",
        why,
    ):
        assert words in text
    slowest = text[text.index("slowest steps") :].split("\n")
    assert slowest[2].split() == "1 2.00 s 4.00 s 500 ms 500 ms 1.00 s 2.00 s 3 7 2".split()
    assert [line.split()[0] for line in slowest[2:5]] == ["1", "2", "0"]


@pytest.mark.parametrize("trace", [Trace(3, 3), Trace(0, 1, requests=[request("r", Span("queued", 1, 1))])])
def test_traces_of_almost_nothing(trace: Trace) -> None:
    lines = picture(trace)
    assert any("in 0 steps" in line for line in lines)
    assert not any("slowest" in line for line in lines)


def test_rows_and_sort() -> None:
    requests = [request(f"r{index}", Span("decode", index, index + 1 + 3 * (index % 5))) for index in range(10)]
    trace = Trace(0, 25, [], requests)

    def shown(lines: list[str]) -> list[str]:
        return [line.split()[0] for line in lines if line.startswith("r") and "│" in line]

    assert shown(picture(trace)) == [f"r{index}" for index in range(10)]
    lines = picture(trace, rows=3)
    assert shown(lines) == ["r0", "r1", "r2"]
    assert any("the 3 first to arrive of 10 requests; --rows shows more" in line for line in lines)
    lines = picture(trace, rows=3, sort="duration")
    assert shown(lines) == ["r4", "r9", "r3"]
    assert any("the 3 longest of 10" in line for line in lines)
    assert not any("who ran when" in line for line in picture(trace, rows=0))


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_hostile_names_stay_in_their_rows(tmp_path: Path, seed: int, width: int) -> None:
    world = TracedWorld(tmp_path / "t.json", seed, depth=2)
    world.play([*HOSTILE_IDS, "plain"])
    world.writer.close()
    trace = read_trace(tmp_path / "t.json")
    lines = picture(trace, rows=1000, width=width)
    assert all(cell_len(line) <= width and (line.isprintable() or not line) for line in lines)
    begin = next(index for index, line in enumerate(lines) if line.startswith("who ran when"))
    rows = lines[begin + 2 : begin + 2 + len(trace.requests)]
    bars = [[cell_len(part) for part in row.split("│")[:2]] for row in rows]
    assert all(bar == bars[0] for bar in bars), "the charts of all rows begin and end in the same columns"


def test_ascii_marks_for_terminals_that_know_no_more(tmp_path: Path, seed: int) -> None:
    world = TracedWorld(tmp_path / "t.json", seed)
    world.play([f"r{index}" for index in range(20)])
    world.writer.close()
    lines = picture(read_trace(tmp_path / "t.json"), marks=ASCII)
    assert all(line.isascii() for line in lines)
    assert sum("|" in line for line in lines) > 20 + 8


def test_plain() -> None:
    assert plain("a\nb\x1b[0m é 狐 \ud83e‮") == "a\\nb\\x1b[0m é 狐 \\ud83e\\u202e"
