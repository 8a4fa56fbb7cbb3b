"""Draws a trace in a terminal: a summary, who ran when, the use of the cache, and the slowest steps.

All charts share one time axis: a column is the same moment in each of them. A cell tells what took most of its time, or
the mean over its time, so nothing is sampled away. Exact figures stand beside the charts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minivllm.trace import STEP_PHASES, StepRecord
from minivllm.trace_frame import LEAST_SECONDS, UNICODE, Frame, Marks, digits, seconds_text
from minivllm.trace_reader import RequestTrace, Trace

_CHART_ROWS = 8
_SLOWEST_STEPS = 5
_FIRST_PREEMPTIONS = 5
_STYLES = {
    "queued": "yellow",
    "prefill": "cyan",
    "decode": "green",
    "preempted": "red",
    "used": "green",
    "cached": "cyan",
    "free": "bright_black",
}


def draw(trace: Trace, *, rows: int, sort: str, width: int, marks: Marks = UNICODE) -> Iterator[RenderableType]:
    """The pictures, one after the other, for a terminal of `width` columns.

    rows: most requests to show. sort: "arrival", or "duration": the longest first.
    """
    requests = trace.requests
    if sort == "duration":
        requests = sorted(requests, key=lambda request: request.begin - request.end)
    shown = requests[:rows]
    figures = [figure for figure in _FIGURES if width >= figure.from_width]
    longest = max((cell_len(plain(request.label)) for request in shown), default=0)
    label = min(max(longest, 8), width // 6) + 1
    right = sum(figure.width for figure in figures)
    frame = Frame(trace.begin, trace.end, label, max(width - label - 2 - right, 10), marks)
    yield _summary(trace)
    if shown:
        yield _gantt(frame, shown, len(requests), sort, figures)
    if trace.steps:
        yield _cache(frame, trace.steps)
        yield _load(frame, trace.steps)
        yield _slowest(trace)
    if trace.preemptions:
        yield _preemptions(trace)
    if trace.note:
        yield Text(plain(trace.note), "yellow")


def plain(text: str) -> str:
    """`text` with all that escaped that could move the cursor, change colours or break the line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole > 0 else "0.0%"


def _busy_seconds(steps: Iterable[StepRecord]) -> float:
    """Time in which at least one step was under way."""
    busy, until = 0.0, -math.inf
    for step in sorted(steps):
        busy += max(step.end - max(step.begin, until), 0.0)
        until = max(until, step.end)
    return busy


def _summary(trace: Trace) -> RenderableType:
    steps, wall = trace.steps, trace.end - trace.begin
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True, overflow="crop")
    facts.add_column()
    busy = _share(_busy_seconds(steps), wall)
    facts.add_row("time", f"{seconds_text(wall)}, {busy} of it in {len(steps):,} steps")
    if steps:
        took = sorted(step.end - step.begin for step in steps)
        middle, late, longest = (seconds_text(took[int(share * (len(took) - 1))]) for share in (0.5, 0.99, 1))
        facts.add_row("a step took", f"{middle} (median), {late} (p99), {longest} (longest)")
        sums = [sum(step[index + 1] - step[index] for step in steps) for index in range(len(STEP_PHASES))]
        shares = (f"{name} {_share(part, sum(sums))}" for name, part in zip(STEP_PHASES, sums, strict=True))
        facts.add_row("of a step", ", ".join(shares))
        prefill, decode = sum(step.prefill_tokens for step in steps), sum(step.decode_rows for step in steps)
        rate = digits((prefill + decode) / wall) if wall > 0 else "0"
        facts.add_row("computed", f"{prefill:,} tokens of prompts, {decode:,} of decode rows: {rate} tokens/s")
    ends = Counter(request.finish_reason or "unfinished" for request in trace.requests)
    kinds = ", ".join(f"{count:,} {plain(end)}" for end, count in ends.items())
    facts.add_row("requests", f"{len(trace.requests):,}" + (f": {kinds}" if kinds else ""))
    facts.add_row("prefix cache", _hits(trace))
    lost = sum(preemption.computed_tokens for preemption in trace.preemptions)
    facts.add_row(
        "preemptions", f"{len(trace.preemptions):,}" + (f"; they had computed {lost:,} tokens" if lost else "")
    )
    facts.add_row("evictions", f"{trace.evicted_blocks:,} blocks")
    return facts


def _hits(trace: Trace) -> str:
    """Over the requests that ran at all, as the engine counts them."""
    ran = [request for request in trace.requests if request.cached_tokens is not None]
    prompt, cached = sum(one.prompt_tokens for one in ran), sum(one.cached_tokens or 0 for one in ran)
    held = f"; {trace.num_held:,} waits for another's prefix" if trace.num_held else ""
    return f"{_share(cached, prompt)} of the prompt tokens ({cached:,} of {prompt:,}) were cached{held}"


class _Figure(NamedTuple):
    """A figure beside each request's row, where the terminal is wide enough."""

    title: str
    width: int
    from_width: int
    of: Callable[[RequestTrace], str]


def _after(begin: float, moment: float | None) -> str:
    return "-" if moment is None else seconds_text(moment - begin)


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


_FIGURES = [
    _Figure("first token", 12, 0, lambda one: _after(one.begin, one.first_token)),
    _Figure("in all", 9, 0, lambda one: _after(one.begin, one.end)),
    _Figure("prompt", 8, 100, lambda one: _count(one.prompt_tokens)),
    _Figure("cached", 8, 100, lambda one: _count(one.cached_tokens)),
    _Figure("output", 8, 0, lambda one: _count(one.output_tokens)),
]


def _legend(marks: Marks, kinds: Iterable[str]) -> Text:
    parts = [Text.assemble((marks.cells[kind], _STYLES[kind]), f" {kind}") for kind in kinds]
    return Text("  ").join(parts)


def _title(title: str, marks: Marks, kinds: Iterable[str]) -> Text:
    return Text.assemble("\n", (title, "bold"), "   ", _legend(marks, kinds), no_wrap=True, overflow="crop")


def _gantt(frame: Frame, shown: list[RequestTrace], total: int, sort: str, figures: list[_Figure]) -> RenderableType:
    marks = frame.marks
    lines = [_title("who ran when", marks, ("queued", "prefill", "decode", "preempted"))]
    heads = Text(" " * (frame.label + frame.columns + 2), no_wrap=True, overflow="crop")
    lines.append(heads.append("".join(figure.title.rjust(figure.width) for figure in figures), "bold"))
    for request in shown:
        kinds = frame.mostly(request.spans)
        cells = [(" ", "") if kind is None else (marks.cells[kind], _STYLES[kind]) for kind in kinds]
        numbers = "".join(figure.of(request).rjust(figure.width) for figure in figures)
        lines.append(frame.row(_cut(plain(request.label), frame.label - 1), cells, numbers))
    lines += frame.axis()
    if len(shown) < total:
        order = "first to arrive" if sort == "arrival" else "longest"
        lines.append(Text(f"the {len(shown):,} {order} of {total:,} requests; --rows shows more", "dim"))
    return Group(*lines)


def _cut(label: str, cells: int) -> str:
    return label if cell_len(label) <= cells else set_cell_size(label, cells - 1) + "~"


def _cache(frame: Frame, steps: list[StepRecord]) -> RenderableType:
    """Blocks as a stack: used, cached, free. What there is at all has at least one cell."""
    marks = frame.marks
    samples = [(step.end, (step.used_blocks, step.cached_blocks, step.free_blocks)) for step in steps]
    stacks = [_stack(means) for means in frame.means(samples)]
    total = max(sum(values) for _, values in samples)
    used, cached, free = zip(*(values for _, values in samples), strict=True)
    notes = {1: f" used up to {max(used):,}", 2: f" cached up to {max(cached):,}", 3: f" free down to {min(free):,}"}
    lines = [_title("blocks of the KV cache", marks, ("used", "cached", "free"))]
    for height in reversed(range(_CHART_ROWS)):
        cells = [
            (" ", "") if stack is None else (marks.cells[stack[height]], _STYLES[stack[height]]) for stack in stacks
        ]
        number = f"{total:,}" if height == _CHART_ROWS - 1 else "0" if height == 0 else ""
        label = _cut(number, frame.label - 1).rjust(frame.label - 1)
        lines.append(frame.row(label, cells, notes.get(_CHART_ROWS - height, "")))
    return Group(*lines, *frame.axis())


def _stack(means: list[float] | None) -> list[str] | None:
    """A column of the chart from the bottom up."""
    if means is None:
        return None
    used, cached, free = means
    scale = _CHART_ROWS / ((used + cached + free) or 1.0)
    num_used = max(round(used * scale), 1 if used else 0)
    num_cached = max(round((used + cached) * scale) - num_used, 1 if cached else 0)
    return (["used"] * num_used + ["cached"] * num_cached + ["free"] * _CHART_ROWS)[:_CHART_ROWS]


def _load(frame: Frame, steps: list[StepRecord]) -> RenderableType:
    """Small bars for the number of requests and the tokens computed a second."""
    counts = frame.means([(step.end, (step.running, step.waiting)) for step in steps])
    running = [means[0] if means else 0.0 for means in counts]
    waiting = [means[1] if means else 0.0 for means in counts]
    rates = [0.0] * frame.columns
    for step in steps:
        rate = (step.decode_rows + step.prefill_tokens) / max(step.end - step.begin, LEAST_SECONDS)
        for column, part in frame.parts(step.begin, step.end):
            rates[column] += rate * part / frame.column_seconds
    lines = [
        _bars(frame, "running", running, max(step.running for step in steps)),
        _bars(frame, "waiting", waiting, max(step.waiting for step in steps)),
        _bars(frame, "tokens/s", rates, max(rates)),
    ]
    return Group(*lines)


def _bars(frame: Frame, label: str, values: list[float], most: float) -> Text:
    levels = frame.marks.levels
    top = len(levels) - 1
    heights = [min(math.ceil(value / most * top), top) if most else 0 for value in values]
    return frame.row(label, [(levels[height], "blue") for height in heights], f" up to {most:,.0f}")


def _table(title: str) -> Table:
    return Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))


def _slowest(trace: Trace) -> RenderableType:
    numbered = sorted(enumerate(trace.steps), key=lambda item: item[1].begin - item[1].end)[:_SLOWEST_STEPS]
    table = _table("slowest steps")
    for name in ("step", "at", "took", *STEP_PHASES, "decode", "prefill", "waiting"):
        table.add_column(name, justify="right", no_wrap=True, overflow="crop")
    for number, step in numbered:
        phases = (seconds_text(step[index + 1] - step[index]) for index in range(len(STEP_PHASES)))
        at, took = seconds_text(step.begin - trace.begin), seconds_text(step.end - step.begin)
        loads = (step.decode_rows, step.prefill_tokens, step.waiting)
        table.add_row(f"{number:,}", at, took, *phases, *(f"{load:,}" for load in loads))
    return table


def _preemptions(trace: Trace) -> RenderableType:
    title = "preemptions"
    if len(trace.preemptions) > _FIRST_PREEMPTIONS:
        title += f" (the first {_FIRST_PREEMPTIONS} of {len(trace.preemptions):,})"
    table = _table(title)
    table.add_column("at", justify="right", no_wrap=True, overflow="crop")
    table.add_column("request", no_wrap=True, overflow="crop")
    table.add_column("computed", justify="right", no_wrap=True, overflow="crop")
    table.add_column("why")
    for moment, label, computed, why in trace.preemptions[:_FIRST_PREEMPTIONS]:
        at = seconds_text(moment - trace.begin)
        table.add_row(at, Text(_cut(plain(label), 24)), f"{computed:,}", Text(plain(why)))
    return table
