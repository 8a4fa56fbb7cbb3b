"""Reads a trace that `minivllm.trace` wrote: its steps, and the life of each request.

Events come in lines, so a file is read as a stream, an error has a line number, and a file whose writer was killed is
read up to where it ends. What the writer left open ends with the trace.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minivllm.errors import ConfigError
from minivllm.options import show
from minivllm.trace import PROCESS_NAME, STEP_PHASES, StepRecord

_FIX = "give a file that EngineConfig.trace or --trace wrote"


class Span(NamedTuple):
    """A part of a request's life. kind: "queued", "prefill", "decode", or "preempted": queued again. In seconds."""

    kind: str
    begin: float
    end: float


class Preemption(NamedTuple):
    """computed_tokens: what it had computed and lost, but for what stays cached. why: in words."""

    time: float
    label: str
    computed_tokens: int
    why: str


@dataclass(slots=True)
class RequestTrace:
    """One sequence. spans follow each other without a gap from begin to end, in seconds.

    cached_tokens: prompt tokens that were found in the cache when it first ran; None: it never ran.
    first_token: when it came, or None. finish_reason, output_tokens: None where it had not ended when the trace did.
    """

    label: str
    begin: float
    end: float
    prompt_tokens: int
    spans: list[Span] = field(default_factory=list)
    cached_tokens: int | None = None
    first_token: float | None = None
    finish_reason: str | None = None
    output_tokens: int | None = None


@dataclass(slots=True)
class Trace:
    """All that a file tells; times in seconds since the writer began, from the first event to the last.

    requests: in order of arrival. num_held: how often a request waited for a prefix that another was computing.
    evicted_blocks: in all. note: what is missing from the file, or None.
    """

    begin: float = math.inf
    end: float = -math.inf
    steps: list[StepRecord] = field(default_factory=list)
    requests: list[RequestTrace] = field(default_factory=list)
    preemptions: list[Preemption] = field(default_factory=list)
    num_held: int = 0
    evicted_blocks: int = 0
    note: str | None = None


def read_trace(path: Path) -> Trace:
    """Read the file at `path`. Raises ConfigError, with the line, where it cannot be read or is no trace of ours."""
    reader = _Reader()
    try:
        with path.open("rb") as file:
            if file.readline(80).strip() != b"[":
                raise ConfigError(f"{path} does not begin with a line of [, so it is no trace of minivllm; {_FIX}")
            for number, line in enumerate(file, start=2):
                if not _read_line(reader, line, f"{path}, line {number}"):
                    break
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}; {_FIX}") from error
    return reader.finish(path)


def _read_line(reader: _Reader, line: bytes, place: str) -> bool:
    """Take the events of one line in; False where the file ends within it."""
    if reader.closed:
        raise ConfigError(f"{place}: something follows the end of the trace; {_FIX}")
    if line.strip() == b"]":
        reader.closed = True
        return True
    try:
        events = json.loads(b"[" + line.strip().removesuffix(b",") + b"]")
    except (ValueError, RecursionError) as error:
        if line.endswith(b"\n"):
            raise ConfigError(f"{place}: this is no JSON: {error}; {_FIX}") from error
        reader.cut = f"{place}: the file ends within this line, which is left out"
        return False
    for event in events:
        try:
            reader.take(event)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{place}: {show(event)} is no event of a minivllm trace ({what}); {_FIX}") from error
    return True


class _Reader:
    """Turns events into a `Trace`, one after the other."""

    def __init__(self) -> None:
        self.closed = False
        self.cut: str | None = None
        self._named = False
        self._trace = Trace()
        self._open: dict[str, RequestTrace] = {}  # by the number of the request's spans
        self._moments: list[float] = []  # of the step whose slices are being read
        self._counts: list[int] = []

    def take(self, event: dict[str, Any]) -> None:
        """Raises what Python raises for wrong types, names and values where this is no event of ours."""
        kind = event["ph"]
        if kind == "M":
            self._named |= event["name"] == "process_name" and event["args"]["name"] == PROCESS_NAME
            return
        if not self._named:
            raise ValueError(f"no event before it names the process {PROCESS_NAME!r}")
        moment = _seconds(event["ts"])
        trace = self._trace
        trace.begin = min(trace.begin, moment)
        trace.end = max(trace.end, moment)
        if kind == "X":
            self._take_slice(event, moment)
        elif kind == "i" and event["name"] == "evicted":
            trace.evicted_blocks += _count(event["args"]["blocks"])
        elif kind == "b":
            self._take_begin(event, moment)
        elif kind == "e":
            self._take_end(event, moment)
        elif kind == "n":
            self._take_instant(event, moment)

    def finish(self, path: Path) -> Trace:
        """The whole trace; raises ConfigError where there is nothing to show."""
        trace = self._trace
        if not self._named or trace.end < trace.begin:
            raise ConfigError(f"{path} has no events of minivllm; {_FIX}")
        for request in self._open.values():
            request.end = trace.end
            _end_span(request, trace.end)
        if self.cut is not None:
            trace.note = self.cut
        elif not self.closed:
            trace.note = f"{path}: the file ends without its closing bracket: its writer was stopped or still runs"
        return trace

    def _take_slice(self, event: dict[str, Any], begin: float) -> None:
        moments = self._moments
        if event["name"] == "step":
            self._moments, self._counts = [begin], [_count(event["args"][name]) for name in StepRecord._fields[5:]]
            return
        if not moments or event["name"] != STEP_PHASES[len(moments) - 1]:
            raise ValueError("a step is followed by its phases, in their order")
        end = _seconds(event["ts"] + event["dur"])
        if end < begin:
            raise ValueError("it ends before it begins")
        moments.append(end)
        if len(moments) == 5:
            self._trace.steps.append(StepRecord._make([*moments, *self._counts]))
            self._trace.end = max(self._trace.end, end)
            self._moments = []

    def _take_begin(self, event: dict[str, Any], moment: float) -> None:
        request = self._open.get(event["id"])
        if request is None:
            request = RequestTrace(_text(event["name"]), moment, moment, _count(event["args"]["prompt_tokens"]))
            self._open[_text(event["id"])] = request
            self._trace.requests.append(request)
            return
        kind = _text(event["name"])
        if kind == "queued" and request.spans:
            kind = "preempted"
        if kind == "prefill" and request.cached_tokens is None:
            request.cached_tokens = _count(event["args"]["cached_tokens"])
        request.spans.append(Span(kind, moment, moment))

    def _take_end(self, event: dict[str, Any], moment: float) -> None:
        request = self._open[event["id"]]
        _end_span(request, moment)
        facts = event.get("args")
        if facts is None:  # of a span within the request's
            return
        request.end = moment
        if "reason" in facts:
            request.finish_reason = _text(facts["reason"])
            request.output_tokens = _count(facts["output_tokens"])
        del self._open[event["id"]]

    def _take_instant(self, event: dict[str, Any], moment: float) -> None:
        request, name = self._open[event["id"]], event["name"]
        if name == "first_token":
            request.first_token = moment
        elif name == "held":
            self._trace.num_held += 1
        elif name == "preempted":
            facts = event["args"]
            lost = _count(facts["computed_tokens"])
            self._trace.preemptions.append(Preemption(moment, request.label, lost, _text(facts["why"])))


def _end_span(request: RequestTrace, moment: float) -> None:
    if request.spans:
        request.spans[-1] = request.spans[-1]._replace(end=moment)


def _seconds(microseconds: Any) -> float:
    if isinstance(microseconds, bool) or not math.isfinite(microseconds):
        raise ValueError(f"{show(microseconds)} is no time")
    return float(microseconds) / 1e6


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{show(value)} is no count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{show(value)} is no string")
    return value
