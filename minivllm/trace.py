"""Writes what the engine does as a Chrome trace, for https://ui.perfetto.dev and `python -m minivllm trace`.

The format is the JSON array of Google's "Trace Event Format": steps are slices, requests are asynchronous spans, block
use is a counter. What happens at once is a line of whole events and goes to the system in one call, so whenever the
process dies the file ends behind an event; the format lets the closing bracket be missing. Only requests that have not
ended are remembered.
"""

from __future__ import annotations

import io
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from minivllm.errors import ConfigError

STEP_PHASES = ("schedule", "launch", "wait", "update")
PROCESS_NAME = "minivllm"

_Event = dict[str, Any]
_PROCESS, _CACHE_TRACK, _FIRST_STEP_TRACK = 1, 1, 2
# Eighths of a microsecond: exact as binary fractions, so begin + duration is exact in whatever reads the file, and what
# lies inside a slice never seems to reach beyond it.
_TICKS_PER_MICROSECOND = 8


class StepRecord(NamedTuple):
    """One step. begin .. end: seconds of the trace's clock; schedule, launch, wait and update are the gaps between.

    decode_rows, prefill_rows, prefill_tokens: what was computed. running, waiting: sequences after the step.
    used_blocks, cached_blocks, free_blocks: in a block table; held by the radix tree alone; neither; after the step.
    """

    begin: float
    scheduled: float
    launched: float
    waited: float
    end: float
    decode_rows: int
    prefill_rows: int
    prefill_tokens: int
    running: int
    waiting: int
    used_blocks: int
    cached_blocks: int
    free_blocks: int


@dataclass(slots=True)
class _Life:
    """What is open of a request: its own span, known by a number, and within it the phase it is in."""

    number: str
    phase: str


class TraceWriter:
    """Writes a new file at `path`; an older one is replaced. clock: seconds, the clock of the step records too.

    Raises ConfigError where it cannot be written. A disk that gets full later ends the trace with a RuntimeWarning.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str).encode
        self._file = _open(path, "[\n" + self._encode(_named("process", _CACHE_TRACK, PROCESS_NAME)))
        self._clock = clock
        self._start = clock()
        self._requests: dict[str, _Life] = {}
        self._numbers = count(1)
        self._landing: dict[str, int] = {}  # requests all of whose known tokens were scheduled, and when
        self._track_ends: list[int] = []  # of each of the steps' tracks: the end of its last step
        self._write([_named("thread", _CACHE_TRACK, "cache")])

    def event(self, name: str, label: str | None, facts: Mapping[str, object]) -> None:
        """Something happened to the request called `label`, or to the cache where that is None.

        "queued", "admitted", "preempted" and "finished" begin and end spans, and `facts` go with them; what else comes
        is an instant. Two requests of one label at once (a sample of "a", and a request called "a/1") appear as one.
        """
        now = self._ticks(self._clock())
        if label is None:
            self._write([_event("i", name, now, facts, tid=_CACHE_TRACK, s="t")])
            return
        life = self._requests.get(label)
        if name == "queued" and life is None:
            life = self._requests[label] = _Life(str(next(self._numbers)), "queued")
            self._write([_span("b", label, life, now, facts), _span("b", "queued", life, now)])
        elif life is None:
            return
        elif name == "admitted":
            self._write(self._enter("prefill", label, now, facts))
        elif name == "finished":
            del self._requests[label]
            self._landing.pop(label, None)
            self._write(_end(label, life, now, facts))
        else:
            moved = self._enter("queued", label, now) if name == "preempted" else []
            self._write([_span("n", name, life, now, facts), *moved])
            if name == "chunk" and facts["stop"] == facts["of"]:
                self._landing[label] = now

    def step(self, record: StepRecord) -> None:
        """A step has ended; steps come in the order in which they were scheduled."""
        ticks = begin, scheduled, _, waited, end = [self._ticks(moment) for moment in record[:5]]
        track, facts = self._track(begin, end), dict(zip(record._fields[5:], record[5:], strict=True))
        events = [_slice("step", track, begin, end, facts)]
        events += [_slice(name, track, *span) for name, span in zip(STEP_PHASES, pairwise(ticks), strict=True)]
        counters = {
            "blocks": {"used": record.used_blocks, "cached": record.cached_blocks, "free": record.free_blocks},
            "requests": {"running": record.running, "waiting": record.waiting},
            "tokens of a step": {"decode": record.decode_rows, "prefill": record.prefill_tokens},
        }
        events += [_event("C", name, end, values) for name, values in counters.items()]
        for label in [label for label, moment in self._landing.items() if moment <= scheduled]:
            events += self._enter("decode", label, waited)
        self._write(events)

    def close(self) -> None:
        """End all open spans and the file. What comes later is dropped; a second call does nothing."""
        now = self._ticks(self._clock())
        for label, life in self._requests.items():
            self._write(_end(label, life, now, {"unfinished": True}))
        self._put("\n]")
        self._file.close()

    def _enter(self, phase: str, label: str, now: int, facts: Mapping[str, object] | None = None) -> list[_Event]:
        life = self._requests[label]
        self._landing.pop(label, None)
        ended, life.phase = life.phase, phase
        return [_span("e", ended, life, now), _span("b", phase, life, now, facts)]

    def _track(self, begin: int, end: int) -> int:
        """The first track that is free at `begin`: steps that overlap lie on several."""
        ends = self._track_ends
        index = next((index for index, free in enumerate(ends) if free <= begin), len(ends))
        if index == len(ends):
            self._write([_named("thread", _FIRST_STEP_TRACK + index, f"steps {index + 1}")])
        ends[index : index + 1] = [end]
        return _FIRST_STEP_TRACK + index

    def _ticks(self, moment: float) -> int:
        return round((moment - self._start) * 1e6 * _TICKS_PER_MICROSECOND)

    def _write(self, events: list[_Event]) -> None:
        """Append a line of at least one event."""
        self._put(",\n" + self._encode(events)[1:-1])

    def _put(self, text: str) -> None:
        if self._file.closed:
            return
        data = text.encode("utf-8", "replace")  # half of a surrogate pair is no character
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.close()
            warnings.warn(f"the trace {self._path} ends here: it cannot be written: {error}", RuntimeWarning, 3)


def _open(path: str | Path, first: str) -> io.FileIO:
    file = None
    try:
        file = io.FileIO(path, "w")
        file.write(first.encode())
    except (OSError, ValueError) as error:  # ValueError: a null character
        if file is not None:
            file.close()
        fix = "give the path of a file in a folder that exists and can be written"
        raise ConfigError(f"trace is {str(path)!r}, which cannot be written: {error}; {fix}") from error
    return file


def _event(kind: str, name: str, ticks: int, args: Mapping[str, object] | None = None, **fields: object) -> _Event:
    event = {"ph": kind, "name": name, "pid": _PROCESS, "ts": ticks / _TICKS_PER_MICROSECOND, **fields}
    return event if args is None else {**event, "args": args}


def _slice(name: str, track: int, begin: int, end: int, args: Mapping[str, object] | None = None) -> _Event:
    return _event("X", name, begin, args, tid=track, dur=(end - begin) / _TICKS_PER_MICROSECOND)


def _span(kind: str, name: str, life: _Life, ticks: int, args: Mapping[str, object] | None = None) -> _Event:
    return _event(kind, name, ticks, args, tid=_CACHE_TRACK, cat="request", id=life.number)


def _end(label: str, life: _Life, ticks: int, facts: Mapping[str, object]) -> list[_Event]:
    return [_span("e", life.phase, life, ticks), _span("e", label, life, ticks, facts)]


def _named(what: str, track: int, name: str) -> _Event:
    return {"ph": "M", "name": f"{what}_name", "pid": _PROCESS, "tid": track, "args": {"name": name}}
