"""What each step of a recorded run computed, and how long it took, out of the trace that `EngineConfig.trace` writes.

The trace tells for each step how many sequences decoded, but not how long they were: that follows from the chunks of
their prompts, as every sequence whose prompt is computed grows by one token a step until it ends.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivllm.errors import ConfigError
from minivllm.trace_reader import read_trace
from simulation.cost import StepLoad


@dataclass(slots=True)
class Recording:
    """loads, seconds: of the steps of which all is known; seconds is the device's time, from the launch, or from the
    end of the step before where that was still out, to the results. host_seconds: of the same steps, schedule and
    update. skipped: steps whose decoding rows could not be accounted for.
    """

    loads: list[StepLoad] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    skipped: int = 0


class _Sequences:
    """Follows all requests by their ids in the trace."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # the position at which nothing is left to compute
        self._decoding: dict[str, int] = {}  # the position of the next query
        self._landing: dict[str, int] = {}  # the same, of those whose prompt ends in the step being looked at
        self._tokens = self._pairs = 0  # of the chunks of that step

    def take(self, event: dict[str, Any]) -> None:
        """One event of a request, in order of time."""
        name, number, args = event["name"], event["id"], event.get("args", {})
        if event["ph"] == "b" and "max_tokens" in args:
            self._last[number] = args["prompt_tokens"] + args["max_tokens"] - 1
        elif name == "chunk":
            start, stop = args["start"], args["stop"]
            self._tokens += stop - start
            self._pairs += (stop * (stop + 1) - start * (start + 1)) // 2
            if stop == args["of"]:
                self._landing[number] = stop
        elif name == "preempted" or (event["ph"] == "e" and "args" in event):
            self._decoding.pop(number, None)

    def step(self) -> StepLoad:
        """What a step computes; all that happened before it was scheduled has been taken."""
        positions = self._decoding
        load = StepLoad(len(positions), self._tokens, sum(positions.values()) + len(positions), self._pairs)
        grown = {number: position + 1 for number, position in positions.items()}
        left = {**grown, **self._landing}
        self._decoding = {number: position for number, position in left.items() if position < self._last[number]}
        self._landing, self._tokens, self._pairs = {}, 0, 0
        return load


def read_recording(path: Path) -> Recording:
    """The steps of a trace file, which may be cut off at its end. Raises ConfigError for any other file."""
    steps = sorted(read_trace(path).steps)  # by their begin
    try:
        happened = _request_events(path)
        recording, sequences, index, free = Recording(), _Sequences(), 0, -math.inf
        begins = [step.begin for step in steps] + [math.inf]
        for number, step in enumerate(steps, start=1):
            while index < len(happened) and step.scheduled >= happened[index]["ts"] / 1e6 < begins[number]:
                sequences.take(happened[index])
                index += 1
            load, seconds = sequences.step(), step.waited - max(step.scheduled, free)
            free = step.waited
            if (load.rows, load.tokens) != (step.decode_rows, step.prefill_tokens) or seconds <= 0:
                recording.skipped += 1
                continue
            recording.loads.append(load)
            recording.seconds.append(seconds)
            recording.host_seconds.append(step.scheduled - step.begin + step.end - step.waited)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path}: an event of a request has no {error}; record the run again") from None
    return recording


def _request_events(path: Path) -> list[dict[str, Any]]:
    """The events of requests in the order of the file, which is that of time; a whole line holds whole events."""
    events: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if '"cat":"request"' in line and line.endswith("\n"):
                events += [
                    event for event in json.loads(f"[{line.strip().strip(',')}]") if event.get("cat") == "request"
                ]
    return events
