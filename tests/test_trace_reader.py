"""Reading: what comes back against a book kept beside the writer, files that were cut, and files that are no trace."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from minivllm.errors import ConfigError
from minivllm.trace import StepRecord, TraceWriter
from minivllm.trace_reader import Trace, read_trace
from tests.trace_world import HOSTILE_IDS, TracedWorld

NAMED = '[\n{"ph":"M","name":"process_name","pid":1,"tid":1,"args":{"name":"minivllm"}}'


def recorded(path: Path, seed: int, depth: int = 1) -> TracedWorld:
    world = TracedWorld(path, seed, depth=depth)
    world.play([*HOSTILE_IDS, *(f"r{index}" for index in range(12))])
    world.writer.close()
    return world


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_trace_is_what_happened(tmp_path: Path, seed: int, depth: int) -> None:
    world = recorded(tmp_path / "t.json", seed, depth)
    trace, run, start = read_trace(tmp_path / "t.json"), world.run, world.start
    assert trace.note is None
    assert len(trace.steps) == len(run.steps)
    for read, told in zip(trace.steps, run.steps, strict=True):
        assert read[5:] == told[5:]
        assert read[:5] == pytest.approx([moment - start for moment in told[:5]], abs=1e-7)
    assert [one.label for one in trace.requests] == [one.label.replace("\ud83e", "?") for one in run.requests]
    for read, request in zip(trace.requests, run.requests, strict=True):
        assert read.begin == pytest.approx(request.arrival_time - start, abs=1e-7)
        assert request.finish_time is not None and request.finish_reason is not None
        assert read.end == pytest.approx(request.finish_time - start, abs=1e-7)
        assert read.prompt_tokens == len(request.prompt_token_ids)
        assert (read.finish_reason, read.output_tokens) == (request.finish_reason.value, len(request.output_token_ids))
        if request.first_token_time is None:
            assert read.first_token is None
        else:
            assert read.first_token == pytest.approx(request.first_token_time - start, abs=1e-7)
            assert read.cached_tokens == request.num_cached_tokens
        kinds = [span.kind for span in read.spans]
        assert kinds.count("preempted") == request.num_preemptions
        assert kinds[0] == "queued" and "queued" not in kinds[1:]
        assert [read.begin, *(span.end for span in read.spans)] == [*(span.begin for span in read.spans), read.end]
        landed = [span.begin for span in read.spans if span.kind == "decode"]
        assert landed == pytest.approx([moment - start for moment in run.landed.get(request.label, [])], abs=1e-7)
    counts = Counter(name for _, name, _, _ in run.events)
    assert (trace.num_held, len(trace.preemptions)) == (counts["held"], counts["preempted"])
    assert trace.evicted_blocks == sum(facts["blocks"] for _, name, _, facts in run.events if name == "evicted")
    ran = [one for one in trace.requests if one.cached_tokens is not None]
    assert sum(one.cached_tokens or 0 for one in ran) == world.blocks.stats.cached_tokens
    assert sum(one.prompt_tokens for one in ran) == world.blocks.stats.prompt_tokens


def test_a_cut_file_is_read_up_to_the_cut(tmp_path: Path, seed: int) -> None:
    path, rng = tmp_path / "t.json", random.Random(seed)
    recorded(path, seed)
    data, whole = path.read_bytes(), read_trace(path)
    for cut in [len(data) - 1, data.rindex(b"\n"), *rng.choices(range(400, len(data)), k=40)]:
        path.write_bytes(data[:cut])
        trace = read_trace(path)
        assert trace.note is not None
        lines = data[:cut].count(b"\n") + 1
        if cut < len(data) - 1 and data[cut : cut + 1] not in b",\n" and data[cut - 1 : cut] not in b"},\n":
            assert f"line {lines}: the file ends within this line" in trace.note
        assert trace.steps == whole.steps[: len(trace.steps)]
        assert len(trace.steps) >= data[: data.rindex(b"\n", 0, cut)].count(b'"name":"step"')
        for read, full in zip(trace.requests, whole.requests, strict=False):
            assert (read.label, read.begin) == (full.label, full.begin)
            assert read.end <= trace.end
            if read.finish_reason is None:
                assert read.end == trace.end or full.finish_reason is None
            else:
                assert read == full


def test_what_is_open_ends_with_the_trace(tmp_path: Path) -> None:
    now = [0.0]
    writer = TraceWriter(tmp_path / "t.json", clock=lambda: now[0])
    now[0] = 1.0
    writer.event("queued", "a", {"prompt_tokens": 3})
    now[0] = 2.0
    writer.event("admitted", "a", {"cached_tokens": 2})
    writer.step(StepRecord(2, 2.25, 2.5, 2.75, 4, *range(8)))

    def check(trace: Trace, end: float) -> None:
        [request] = trace.requests
        assert (trace.begin, trace.end) == (1.0, end)
        assert [tuple(span) for span in request.spans] == [("queued", 1.0, 2.0), ("prefill", 2.0, end)]
        assert (request.end, request.finish_reason, request.output_tokens) == (end, None, None)
        assert (request.cached_tokens, request.first_token) == (2, None)
        assert trace.steps == [StepRecord(2, 2.25, 2.5, 2.75, 4, *range(8))]

    trace = read_trace(tmp_path / "t.json")
    check(trace, 4.0)
    assert trace.note is not None and "without its closing bracket" in trace.note
    now[0] = 5.0
    writer.close()
    trace = read_trace(tmp_path / "t.json")
    check(trace, 5.0)
    assert trace.note is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "does not begin with a line of"),
        ("{", "does not begin with a line of"),
        ('{"traceEvents": []}', "does not begin with a line of"),
        ("\x1f\x8b\x08\x00\xff", "does not begin with a line of"),
        ("[" * 5000, "does not begin with a line of"),
        ("[\n", "has no events of minivllm"),
        ("[\n]", "has no events of minivllm"),
        (NAMED + "\n]", "has no events of minivllm"),
        ('[\n{"ph":"i","name":"x","ts":1}\n]', "line 2: .* names the process"),
        ('[\n{"ph":"M","name":"process_name","args":{"name":"chrome"}},\n{"ph":"i","name":"x","ts":1}\n]', "line 3"),
        (NAMED + ",\n{broken},\n]", "line 3: this is no JSON"),
        (NAMED + ",\n" + "[" * 100_000 + "\n]", "line 3: this is no JSON"),
        (NAMED + ",\n1\n]", "line 3: 1 is no event"),
        (NAMED + ",\n[]\n]", "line 3: .* is no event"),
        (NAMED + ',\n{"ph":"X","name":"step","ts":0,"dur":1}\n]', "line 3: .*KeyError: 'args'"),
        (NAMED + ',\n{"ph":"X","name":"wait","ts":0,"dur":1}\n]', "line 3: .*in their order"),
        (NAMED + ',\n{"ph":"i","name":"x","ts":NaN}\n]', "nan is no time"),
        (NAMED + ',\n{"ph":"i","name":"x","ts":1e999}\n]', "inf is no time"),
        (NAMED + ',\n{"ph":"i","name":"x","ts":' + "9" * 400 + "}\n]", "line 3: .* is no event"),
        (NAMED + ',\n{"ph":"i","name":"x","ts":true}\n]', "True is no time"),
        (NAMED + ',\n{"ph":"e","name":"x","ts":1,"id":"7"}\n]', "line 3: .*KeyError: '7'"),
        (NAMED + ',\n{"ph":"b","name":3,"ts":1,"id":"7","args":{"prompt_tokens":1}}\n]', "3 is no string"),
        (NAMED + ',\n{"ph":"b","name":"x","ts":1,"id":"7","args":{"prompt_tokens":-1}}\n]', "-1 is no count"),
        (NAMED + ',\n{"ph":"i","name":"evicted","ts":1,"args":{"blocks":1.5}}\n]', "1.5 is no count"),
        (NAMED + ',\n{"ph":"i","name":"x","ts":1}\n]\nmore', "line 5: something follows the end"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=message) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "give a file that" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_path_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ConfigError, match=r"cannot be read.*give a file that"):
            read_trace(path)


def test_damage_is_an_error_or_nothing_worse(tmp_path: Path, seed: int) -> None:
    """A changed byte either gives another trace or a ConfigError with a line."""
    path, rng = tmp_path / "t.json", random.Random(seed)
    recorded(path, seed)
    lines = path.read_bytes().splitlines(keepends=True)
    outcomes = Counter()
    for _ in range(150):
        data = bytearray(b"".join(lines[:60]))
        data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b'"{}[],:\n0-'])
        path.write_bytes(data)
        try:
            read_trace(path)
            outcomes["read"] += 1
        except ConfigError as error:
            assert "t.json" in str(error)
            outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 10


def test_a_line_holds_whole_events(tmp_path: Path, seed: int) -> None:
    recorded(tmp_path / "t.json", seed)
    lines = (tmp_path / "t.json").read_text(encoding="utf-8").split("\n")
    assert (lines[0], lines[-1]) == ("[", "]")
    for line in lines[1:-1]:
        events = json.loads(f"[{line.removesuffix(',')}]")
        assert events and all(event["ph"] for event in events)
