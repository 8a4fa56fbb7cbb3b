"""`minivllm trace` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trace_world import HOSTILE_IDS, TracedWorld


def run(*arguments: str, encoding: str = "utf-8") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "minivllm", "trace", *arguments]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    return subprocess.run(command, capture_output=True, encoding=encoding, env=env, timeout=60, check=False)


def test_draws_a_run(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "t.json"
    world = TracedWorld(path, seed)
    world.play(["first", *HOSTILE_IDS])
    world.writer.close()
    done = run(str(path), "--width", "100", "--rows", "5", "--sort", "arrival")
    assert done.returncode == 0, done.stderr
    for words in ("who ran when", "\nfirst ", "blocks of the KV cache", "slowest steps", "; --rows shows more"):
        assert words in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100
    done = run(str(path), "--sort", "duration", encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert "# used  o cached  . free" in done.stdout


def test_a_cut_file_is_drawn_with_a_line_that_says_so(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "t.json"
    world = TracedWorld(path, seed)
    world.play(["first", "second"])
    world.writer.close()
    path.write_bytes(path.read_bytes()[:-20])
    done = run(str(path))
    assert done.returncode == 0, done.stderr
    assert "the file ends within this line" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("missing.json",), "cannot be read"),
        ((".",), "cannot be read"),
        (("other.json",), "is no trace of minivllm"),
        (("other.json", "--rows", "-1"), "-1 is not in the range"),
        (("other.json", "--width", "7"), "7 is not in the range"),
        (("other.json", "--sort", "size"), "'size' is not one of"),
        ((), "Missing argument"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"traceEvents": []}), encoding="utf-8")
    done = run(*(str(tmp_path / one) if one[-1:] in ("n", ".") else one for one in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.lower().startswith("error")]) == 1


def test_needs_no_torch() -> None:
    code = (
        "import sys, minivllm.cli.trace, minivllm.trace_reader, minivllm.trace_view; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
