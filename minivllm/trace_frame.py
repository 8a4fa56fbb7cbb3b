"""The grid that all charts of a trace are drawn on: which column a moment lies in, and what a column tells.

A column is the same span of time in every chart. What happened in it is weighed by how long it lasted, so nothing is
sampled away.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import set_cell_size
from rich.text import Text

LEAST_SECONDS = 1e-12  # weight of what took no time: it shows where nothing else does

_ROUNDING = 1e-6  # of a column: less is a rounding error
_STYLE = "bright_black"
# What a cell shows where several kinds of spans share it: the highest, and of equals the longest.
_RANKS = {"queued": 0, "prefill": 1, "decode": 1, "preempted": 2}


class Marks(NamedTuple):
    """The characters of the charts. levels: of small bars, from nothing to full."""

    cells: dict[str, str]
    levels: str
    corner: str
    line: str
    tick: str
    side: str


UNICODE = Marks(
    {"queued": "·", "prefill": "▒", "decode": "█", "preempted": "x", "used": "█", "cached": "▒", "free": "·"},
    levels=" ▁▂▃▄▅▆▇█",
    corner="└",
    line="─",
    tick="┬",
    side="│",
)
ASCII = Marks(
    {"queued": ".", "prefill": "o", "decode": "#", "preempted": "x", "used": "#", "cached": "o", "free": "."},
    levels=" .:-=+*%@",
    corner="+",
    line="-",
    tick="+",
    side="|",
)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the charts lie: `columns` cells for the time from begin to end, after a label of `label` cells."""

    begin: float
    end: float
    label: int
    columns: int
    marks: Marks

    @property
    def column_seconds(self) -> float:
        """How long a column is."""
        return max(self.end - self.begin, 1e-6) / self.columns

    def parts(self, begin: float, end: float) -> Iterator[tuple[int, float]]:
        """The columns that a span of time lies in, and how many seconds it has in each; always at least one."""
        width, last = self.column_seconds, self.columns - 1
        first = min(int((begin - self.begin) / width), last)
        found = False
        for column in range(first, min(int((end - self.begin) / width), last) + 1):
            left = self.begin + column * width
            seconds = min(end, left + width) - max(begin, left)
            if seconds > _ROUNDING * width:
                found = True
                yield column, seconds
        if not found:
            yield first, LEAST_SECONDS

    def mostly(self, spans: Iterable[tuple[str, float, float]]) -> list[str | None]:
        """For each column the kind of span that took most of its time; None where there was none.

        So that nothing rare goes unseen, the time after a preemption comes before that of computing, and waiting at
        first is shown only where nothing else happened.
        """
        seconds: list[defaultdict[str, float]] = [defaultdict(float) for _ in range(self.columns)]
        for kind, begin, end in spans:
            for column, part in self.parts(begin, end):
                seconds[column][kind] += part
        return [max(kinds, key=lambda kind: (_RANKS[kind], kinds[kind]), default=None) for kinds in seconds]

    def means(self, samples: Sequence[tuple[float, Sequence[float]]]) -> list[list[float] | None]:
        """The means of some values over each column's time. A sample holds until the next; None before the first."""
        sums: list[list[float] | None] = [None] * self.columns
        ends = [*(moment for moment, _ in samples[1:]), self.end]
        for (moment, values), until in zip(samples, ends, strict=True):
            for column, part in self.parts(moment, until):
                old = sums[column] or [0.0] * (len(values) + 1)
                sums[column] = [total + value * part for total, value in zip(old, (*values, 1.0), strict=True)]
        return [total and [value / total[-1] for value in total[:-1]] for total in sums]

    def row(self, label: str, cells: Iterable[tuple[str, str]], right: str) -> Text:
        """One line: label, cells of (character, style), and what stands beside them."""
        text = Text(set_cell_size(label, self.label), no_wrap=True, overflow="crop")
        text.append(self.marks.side, _STYLE)
        for character, style in cells:
            text.append(character, style)
        text.append(self.marks.side, _STYLE)
        return text.append(right)

    def axis(self) -> list[Text]:
        """The two lines below a chart: ticks at round times since the trace's begin, and their labels."""
        ticks, marks = dict(self._ticks()), self.marks
        line = "".join(marks.tick if column in ticks else marks.line for column in range(self.columns))
        labels = ""
        for column, label in ticks.items():
            labels = labels.ljust(column) + label
        lines = [" " * self.label + marks.corner + line, " " * (self.label + 1) + labels]
        return [Text(line, _STYLE, no_wrap=True, overflow="crop") for line in lines]

    def _ticks(self) -> Iterator[tuple[int, str]]:
        least = self.column_seconds * 10
        power = 10.0 ** math.floor(math.log10(least))
        step = next(factor * power for factor in (1, 2, 5, 10, 20) if factor * power >= least)
        count = int((self.end - self.begin) / step)
        size, unit = _unit(count * step)
        yield 0, "0"
        for index in range(1, count + 1):
            column = int(index * step / self.column_seconds)
            if column < self.columns - 4:  # the label stands to the right of its tick
                yield column, f"{index * step / size:g} {unit}"


def seconds_text(seconds: float) -> str:
    """Three digits and a unit: "1.23 s", "45.6 ms", "789 us"."""
    size, unit = _unit(seconds)
    return f"{digits(seconds / size)} {unit}"


def _unit(seconds: float) -> tuple[float, str]:
    units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
    return next((unit for unit in units if seconds >= 0.9995 * unit[0]), units[-1])


def digits(value: float) -> str:
    """Three digits, or all before the point where these are more."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
