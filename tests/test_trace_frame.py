"""Columns of time against the same questions asked at many moments."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from minivllm.trace_frame import UNICODE, Frame, seconds_text
from minivllm.trace_reader import Span


def asked(frame: Frame, column: int) -> list[float]:
    """Moments in the middle of each hundredth of a second of a column."""
    hundredths = round(frame.column_seconds * 100)
    return [frame.begin + column * frame.column_seconds + (index + 0.5) / 100 for index in range(hundredths)]


def test_cells_tell_what_took_most_of_their_time(seed: int) -> None:
    rng = random.Random(seed)
    frame = Frame(5.0, 25.0, 9, 40, UNICODE)
    moments = [moment / 100 for moment in sorted(rng.sample(range(500, 2501), rng.randrange(2, 40)))]
    kinds = ("queued", "prefill", "decode", "preempted")
    spans = [Span(rng.choice(kinds), begin, end) for begin, end in pairwise(moments)]
    for column, kind in enumerate(frame.mostly(spans)):
        found = Counter(
            span.kind for moment in asked(frame, column) for span in spans if span.begin <= moment < span.end
        )
        if found["preempted"]:
            assert kind == "preempted"
        elif found["prefill"] or found["decode"]:
            assert kind in ("prefill", "decode") and found[kind] == max(found["prefill"], found["decode"])
        else:
            assert kind == ("queued" if found else None)


def test_columns_are_means_over_time(seed: int) -> None:
    rng = random.Random(seed)
    frame = Frame(0.0, 10.0, 9, 20, UNICODE)
    moments = [moment / 100 for moment in sorted(rng.sample(range(1000), rng.randrange(1, 60)))]
    samples = [(moment, (rng.random(), rng.random())) for moment in moments]
    for column, means in enumerate(frame.means(samples)):
        held = [[values for since, values in samples if since <= moment][-1:] for moment in asked(frame, column)]
        pairs = [values for one in held for values in one]
        if pairs:
            assert means == pytest.approx([sum(values) / len(pairs) for values in zip(*pairs, strict=True)])
        else:
            assert means is None


def test_what_takes_no_time_is_seen_where_nothing_else_is() -> None:
    frame = Frame(0.0, 10.0, 9, 10, UNICODE)
    cells = frame.mostly([("queued", 3.5, 3.5), ("queued", 5.0, 6.0), ("prefill", 6.0, 6.0), ("decode", 6.0, 8.0)])
    assert cells == [None, None, None, "queued", None, "queued", "decode", "decode", None, None]
    assert frame.mostly([("decode", 10.0, 10.0)])[-1] == "decode"


@pytest.mark.parametrize(
    ("seconds", "columns", "labels"),
    [
        (10.0, 40, "0                   5 s"),
        (2.0, 40, "0         0.5 s     1 s       1.5 s"),
        (0.0101, 40, "0                  5 ms"),
        (0.0, 20, "0"),
    ],
)
def test_ticks_stand_at_round_times(seconds: float, columns: int, labels: str) -> None:
    line, text = (part.plain for part in Frame(7.0, 7.0 + seconds, 3, columns, UNICODE).axis())
    assert text == "    " + labels
    assert line.startswith("   └┬─")
    assert len(line) == 4 + columns
    assert line.count("┬") == len(labels.replace(" s", "").replace(" ms", "").split())


def test_seconds_have_three_digits() -> None:
    values = {0: "0.00 us", 1.25e-6: "1.25 us", 0.9996e-3: "1.00 ms", 0.0123456: "12.3 ms", 0.99951: "1.00 s"}
    values |= {99.96: "100 s", 12345.6: "12,346 s", 9.996: "10.0 s", 0.99949: "999 ms"}
    assert {value: seconds_text(value) for value in values} == values
