"""Results as a picture: how latencies are distributed, and who ran, who waited and what lay in the cache over time."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulation.result import Result

matplotlib.use("Agg")  # draws files; needs no screen


def save(results: list[Result], path: Path) -> None:
    """Write the picture in the format of the path's ending; raises ValueError for an ending without a format."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    (first, second, third), (running, waiting, blocks) = figure.subplots(2, 3)
    for index, result in enumerate(results):
        color = f"C{index % 10}"
        for axes, values in ((first, result.ttft), (second, result.tpot), (third, result.end_to_end)):
            _add_distribution(axes, np.asarray(values), result.name, color)
        times = [sample.time for sample in result.timeline.samples]
        for axes, name in ((running, "running"), (waiting, "waiting")):
            axes.plot(times, [getattr(sample, name) for sample in result.timeline.samples], color=color, linewidth=0.8)
        _add_blocks(blocks, times, result, color)
    for axes, label in (
        (first, "time to first token, s"),
        (second, "time a further token, s"),
        (third, "end to end, s"),
    ):
        _finish(axes, label, "share of requests")
        axes.set(xscale="log", ylim=(0, 1))
    for axes, label in (
        (running, "requests running"),
        (waiting, "requests waiting"),
        (blocks, "share of blocks: used, used + cached (thin)"),
    ):
        _finish(axes, "virtual time, s", label)
        axes.set(xlim=(0, None), ylim=(0, 1.02) if axes is blocks else (0, None))
    if any(len(result.ttft) for result in results):
        first.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _add_distribution(axes: Axes, values: np.ndarray, name: str, color: str) -> None:
    """The share of values up to each value; at most 1,000 points."""
    if not len(values):
        return
    shares = np.linspace(0, 1, min(1000, len(values)))
    axes.plot(np.quantile(values, shares), shares, label=name, color=color)


def _add_blocks(axes: Axes, times: list[float], result: Result, color: str) -> None:
    samples = result.timeline.samples
    axes.plot(times, [sample.used for sample in samples], color=color, linewidth=1.2)
    axes.plot(times, [sample.used + sample.cached for sample in samples], color=color, linewidth=0.5, alpha=0.7)


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
