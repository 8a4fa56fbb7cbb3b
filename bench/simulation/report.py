"""Results as a table, one column a run, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from rich.table import Column, Table

from simulation.result import QUANTILES, Result

Figures = dict[str, Any]
Cell = Callable[[Figures], str]


def table(results: list[Result]) -> Table:
    """All runs beside each other. TTFT: time to first token. TPOT: time per output token after it."""
    figures = [result.figures() for result in results]
    out = Table(Column(no_wrap=True), title=f"simulated on {results[0].total:,} requests")
    for result in results:
        out.add_column(result.name, justify="right", overflow="fold")
    for name, cell in _latency_rows(figures) + _rows():
        out.add_row(name, *(cell(one) for one in figures))
    return out


def as_json(results: list[Result]) -> list[dict[str, Any]]:
    """Name, settings and figures of each run."""
    return [{"name": one.name, "settings": dataclasses.asdict(one.settings), **one.figures()} for one in results]


def _latency_rows(figures: list[Figures]) -> list[tuple[str, Cell]]:
    """A row for each quantile of each latency, and of the first token for each priority."""
    levels = sorted({level for one in figures for level in one["ttft_s_by_priority"]})
    kinds: list[tuple[str, float, Callable[[Figures], Figures]]] = [
        ("TTFT, s", 1, itemgetter("ttft_s")),
        *((f"TTFT of priority {level}, s", 1, _of_priority(level)) for level in levels),
        ("TPOT, ms", 1e3, itemgetter("tpot_s")),
        ("end to end, s", 1, itemgetter("end_to_end_s")),
        ("queueing, s", 1, itemgetter("queueing_s")),
    ]
    return [
        (f"{name}: {key}" if key == "mean" else f"    {key}", _quantile(pick, key, factor))
        for name, factor, pick in kinds
        for key in QUANTILES
    ]


def _of_priority(level: int) -> Callable[[Figures], Figures]:
    return lambda one: one["ttft_s_by_priority"].get(level, {})


def _quantile(pick: Callable[[Figures], Figures], key: str, factor: float) -> Cell:
    def cell(one: Figures) -> str:
        value = pick(one).get(key)
        return "-" if value is None else f"{value * factor:.3g}"

    return cell


def _rows() -> list[tuple[str, Cell]]:
    """What is told by one figure or two."""
    return [
        ("ends", lambda one: ", ".join(f"{count:,} {name}" for name, count in one["requests"].items() if count)),
        ("virtual seconds", lambda one: f"{one['makespan_s']:,.2f}"),
        ("device busy", lambda one: f"{one['busy_share']:.1%}"),
        ("requests/s", lambda one: f"{one['requests_per_s']:,.2f}"),
        ("answer tokens/s", lambda one: f"{one['answer_tokens_per_s']:,.0f}"),
        ("hit rate", lambda one: f"{one['hit_rate']:.2%}"),
        ("preemptions", lambda one: f"{one['preemptions']:,}"),
        ("evicted blocks", lambda one: f"{one['evicted_blocks']:,}"),
        ("steps", lambda one: f"{one['steps']:,}"),
        ("rows / tokens a step", lambda one: f"{one['mean_rows']:.1f} / {one['mean_batched_tokens']:.1f}"),
        ("block use, mean / peak", lambda one: f"{one['mean_block_use']:.1%} / {one['peak_block_use']:.1%}"),
        ("real seconds", lambda one: f"{one['real_s']:.1f}"),
        ("  audits (number)", lambda one: f"{one['real_check_s']:.1f} ({one['checks']:,})"),
        ("  scheduler, us a step", lambda one: f"{one['real_scheduler_us_per_step']:.0f}"),
        ("requests a real second", lambda one: f"{one['simulated_requests_per_real_s']:,.0f}"),
        ("peak MiB at 10 / 50 / 100 %", _rss),
    ]


def _rss(one: Figures) -> str:
    points = one["peak_rss_mib"]
    return " / ".join(f"{points[place]['mib']:.0f}" for place in (0, (len(points) - 1) // 2, -1)) if points else "-"
