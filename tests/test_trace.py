"""The file: random runs of the real scheduler, parsed as plain JSON and checked by the rules of the format."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
import tracemalloc
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from minivllm.errors import ConfigError
from minivllm.trace import STEP_PHASES, StepRecord, TraceWriter
from minivllm.trace_reader import read_trace
from tests.trace_world import HOSTILE_IDS, NUM_BLOCKS, TracedWorld

FACTS = {"prompt_tokens": 5, "max_tokens": 3, "priority": 0}
ADMITTED = {"slot": 0, "cached_tokens": 0, "waited_s": 0.5, "again": False}
FINISHED = {"reason": "length", "output_tokens": 3}


def names(count: int) -> list[str]:
    return [*HOSTILE_IDS, *(f"r{index}" for index in range(count))]


def parse(path: Path) -> list[dict[str, Any]]:
    """All events; the closing bracket may be missing."""
    text = path.read_bytes().decode("utf-8")
    return json.loads(text if text.endswith("]") else text + "]")


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_spans_nest(tmp_path: Path, seed: int, depth: int) -> None:
    world = TracedWorld(tmp_path / "t.json", seed, depth=depth)
    run = world.play(names(10))
    world.writer.close()
    events = parse(tmp_path / "t.json")
    stacks: dict[str, list[tuple[str, float]]] = {}
    for event in [event for event in events if event["ph"] in "ben"]:
        stack = stacks.setdefault(event["id"], [])
        if event["ph"] == "b":
            assert len(stack) < 2
            stack.append((event["name"], event["ts"]))
            continue
        if event["ph"] == "e":
            name, begin = stack.pop()
            assert name == event["name"]
            assert begin <= event["ts"]
        assert stack or event["args"]["reason"], "an instant lies outside of its request"
    assert len(stacks) == len(run.requests)
    assert not any(stacks.values()), "a span has no end"
    tracks = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            tracks[event["tid"]].append((event["ts"], event["ts"] + event["dur"], event["name"]))
    assert len(tracks) <= depth
    for slices in tracks.values():
        check_slices(slices)


def check_slices(slices: list[tuple[float, float, str]]) -> None:
    """Steps follow each other, and the phases fill each; exactly, as the times are binary fractions."""
    last = -1.0
    for index in range(0, len(slices), 5):
        begin, end, name = slices[index]
        assert (name, [phase[2] for phase in slices[index + 1 : index + 5]]) == ("step", list(STEP_PHASES))
        assert last <= begin
        for phase_begin, phase_end, _ in slices[index + 1 : index + 5]:
            assert phase_begin == begin
            begin = phase_end
        assert begin == end
        last = end


@pytest.mark.parametrize("depth", [1, 2])
def test_counters_add_up(tmp_path: Path, seed: int, depth: int) -> None:
    world = TracedWorld(tmp_path / "t.json", seed, depth=depth)
    run = world.play(names(10))
    world.writer.close()
    num_open = num_prefill = num_chunks = num_decodes = num_steps = 0
    inside: set[str] = set()
    for event in parse(tmp_path / "t.json"):
        kind, args = event["ph"], event.get("args", {})
        if kind == "b" and event["id"] not in inside:
            inside.add(event["id"])
        elif kind == "e" and args:
            inside.remove(event["id"])
        elif kind == "n" and event["name"] == "chunk":
            num_chunks += args["stop"] - args["start"]
        elif (kind, event["name"]) == ("C", "blocks"):
            assert args["used"] + args["cached"] + args["free"] == NUM_BLOCKS
        elif (kind, event["name"]) == ("C", "requests"):
            assert args["running"] + args["waiting"] == len(inside)
            num_open = max(num_open, len(inside))
        elif (kind, event["name"]) == ("C", "tokens of a step"):
            num_prefill += args["prefill"]
            num_decodes += args["decode"]
            num_steps += 1
    assert num_prefill == num_chunks > 0
    assert num_decodes == sum(step.decode_rows for step in run.steps) > 0
    assert num_steps == len(run.steps)
    assert num_open > 1


def test_hostile_ids_keep_their_names(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t.json")
    for name in HOSTILE_IDS:
        writer.event("queued", name, FACTS)
        writer.event("held", name, {"for": name, "shared_tokens": 3})
        writer.event("evicted", None, {"blocks": 1, "why": f"{name} grew to 3 tokens"})
    for name in HOSTILE_IDS:
        writer.event("finished", name, FINISHED)
    writer.close()
    events = parse(tmp_path / "t.json")
    told = [event["name"] for event in events if event["ph"] == "b" and "args" in event]
    assert told == [name.replace("\ud83e", "?") for name in HOSTILE_IDS], "half of a surrogate pair is no character"
    assert [event["args"]["for"] for event in events if event["name"] == "held"] == told


def test_every_event_is_in_the_file_at_once(tmp_path: Path, seed: int) -> None:
    rng, path = random.Random(seed), tmp_path / "t.json"
    world = TracedWorld(path, seed)
    last = 0
    for index in range(60):
        if rng.random() < 0.3:
            world.add(f"r{index}")
        world.step()
        events = parse(path)
        told = sum(event["ph"] in "ni" or (event["ph"] == "b" and event["name"] == "prefill") for event in events)
        assert told == sum(name not in ("queued", "finished") for _, name, _, _ in world.run.events)
        assert len(events) >= last
        last = len(events)
    world.writer.close()
    assert last > 60


def test_a_preempted_request_is_queued_again_and_decodes_when_its_tokens_are_back(tmp_path: Path) -> None:
    now = [100.0]
    writer = TraceWriter(tmp_path / "t.json", clock=lambda: now[0])

    def tell(name: str, **facts: object) -> None:
        writer.event(name, "a", facts)
        now[0] += 1

    tell("queued", prompt_tokens=5)
    tell("admitted", cached_tokens=0)
    tell("chunk", start=0, stop=3, of=5)
    writer.step(StepRecord(101.5, 102.5, 102.5, 102.75, 103, *[0] * 8))
    tell("chunk", start=3, stop=5, of=5)
    tell("preempted", why="no room", computed_tokens=5)
    tell("admitted", cached_tokens=0)
    tell("chunk", start=0, stop=5, of=5)  # at 106
    writer.step(StepRecord(103, 105.5, 105.5, 105.75, 106, *[0] * 8))  # an earlier step: not yet
    writer.step(StepRecord(105.75, 106.5, 106.75, 107, 107.5, *[0] * 8))
    now[0] = 110
    writer.event("finished", "a", FINISHED)
    writer.close()
    spans = [(e["ph"], e["name"], e["ts"] / 1e6) for e in parse(tmp_path / "t.json") if e["ph"] in "be"]
    assert spans == [
        *[("b", "a", 0), ("b", "queued", 0), ("e", "queued", 1), ("b", "prefill", 1), ("e", "prefill", 4)],
        *[("b", "queued", 4), ("e", "queued", 5), ("b", "prefill", 5), ("e", "prefill", 7), ("b", "decode", 7)],
        *[("e", "decode", 10), ("e", "a", 10)],
    ]


def test_close_ends_what_is_open_and_drops_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    writer = TraceWriter(path)
    writer.event("queued", "a", FACTS)
    writer.event("queued", "b", FACTS)
    writer.event("admitted", "b", ADMITTED)
    writer.close()
    events = json.loads(path.read_text(encoding="utf-8"))
    assert [event["name"] for event in events if event["ph"] == "e"] == ["queued", "queued", "a", "prefill", "b"]
    assert sum("unfinished" in event.get("args", {}) for event in events) == 2
    before = path.read_bytes()
    writer.event("finished", "a", FINISHED)
    writer.event("queued", "c", FACTS)
    writer.step(StepRecord(*[0.0] * 5, *[0] * 8))
    writer.close()
    assert path.read_bytes() == before


def test_an_id_may_come_again(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t.json")
    for _ in range(2):
        writer.event("queued", "a", FACTS)
        writer.event("finished", "a", FINISHED)
    writer.close()
    numbers = [event["id"] for event in parse(tmp_path / "t.json") if event["ph"] == "b"]
    assert len(set(numbers)) == 2


def test_two_requests_of_one_label_harm_nobody(tmp_path: Path, seed: int) -> None:
    """Sample 1 of "a" and sample 0 of "a/1" have the same label."""
    for attempt in range(20):
        world = TracedWorld(tmp_path / "t.json", seed + attempt)
        world.add("a", num_samples=3)
        world.step()
        world.add("a/1")
        while world.scheduler.has_unfinished:
            world.step()
        world.writer.close()
        trace = read_trace(tmp_path / "t.json")
        assert {request.label for request in trace.requests} >= {"a", "a/1", "a/2"}
        assert all(request.finish_reason for request in trace.requests)
        assert len(trace.steps) == len(world.run.steps)


def test_memory_holds_only_the_living(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "t.json")

    def live(count: int) -> int:
        for index in range(count):
            writer.event("queued", f"r{index}", FACTS)
            writer.event("admitted", f"r{index}", ADMITTED)
            writer.event("chunk", f"r{index}", {"start": 0, "stop": 5, "of": 5})
            writer.event("finished", f"r{index}", FINISHED)
            writer.step(StepRecord(*[float(index)] * 5, *[0] * 8))
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = live(50)
        after = live(400)
    finally:
        tracemalloc.stop()
    writer.close()
    assert after - before < 10_000


@pytest.mark.parametrize("where", ["no/such/folder/t.json", ".", "null\0character", "/dev/full"])
def test_a_path_that_cannot_be_written(tmp_path: Path, where: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        TraceWriter(tmp_path / where)
    assert repr(str(tmp_path / where)) in str(caught.value)


def run_writer(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with a writer `w` in a process of its own."""
    setup = f"""
        import os, resource, signal, sys
        from minivllm.trace import StepRecord, TraceWriter
        w = TraceWriter({str(path)!r})
        def live(name):
            w.event("queued", name, {FACTS})
            w.event("admitted", name, {ADMITTED})
            w.step(StepRecord(*[0.0] * 5, *[0] * 8))
    """
    program = textwrap.dedent(setup) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_a_killed_writer_leaves_whole_events(tmp_path: Path) -> None:
    done = run_writer(tmp_path / "t.json", "live('a'); live('b'); os.kill(os.getpid(), signal.SIGKILL)")
    assert done.returncode == -9
    text = (tmp_path / "t.json").read_text(encoding="utf-8")
    assert text.endswith("}")
    events = json.loads(text + "]")
    assert [event["name"] for event in events if event["ph"] == "b"] == [
        "a",
        "queued",
        "prefill",
        "b",
        "queued",
        "prefill",
    ]
    assert sum(event["name"] == "step" for event in events) == 2


def test_a_full_disk_ends_the_trace_and_not_the_engine(tmp_path: Path) -> None:
    code = """
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        for index in range(100):
            live(f"r{index}")
        w.close()
        print("alive")
    """
    done = run_writer(tmp_path / "t.json", code)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "t.json ends here: it cannot be written" in done.stderr
    assert (tmp_path / "t.json").stat().st_size == 5000
