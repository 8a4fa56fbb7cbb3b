"""The command line in a process of its own, on the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "minivllm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=300, check=False)


def test_streams_the_same_text_as_no_stream_and_json() -> None:
    options = ("--max-tokens", "12", "--seed", "5", "--device", "cpu", "Once upon a time")
    streamed, whole, as_json = (
        run("generate", *options),
        run("generate", "--no-stream", *options),
        run("generate", "--json", *options),
    )
    assert (streamed.returncode, whole.returncode, as_json.returncode) == (0, 0, 0), (
        streamed.stderr + whole.stderr + as_json.stderr
    )
    record = json.loads(as_json.stdout)
    assert streamed.stdout == whole.stdout == record["text"] + "\n"
    assert record["prompt"] == "Once upon a time"
    assert record["completion_tokens"] == len(record["token_ids"]) <= 12
    assert record["finish_reason"] in ("length", "stop")


def test_many_prompts_files_and_stats(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("The king said,", encoding="utf-8")
    files = ("--prompt-file", str(tmp_path / "prompt.txt"), "--prompt-file", "-")
    done = run("generate", "First", *files, "--max-tokens", "5", "--stats", "--json", stdin="From stdin")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["First", "The king said,", "From stdin"]
    for word in ("tokens/s", "time to first token", "KV cache: at most 3 of"):
        assert word in done.stderr
    text = run("generate", "First", "Second", "--max-tokens", "5")
    assert "--- 1/2: First" in text.stdout
    assert "--- 2/2: Second" in text.stdout


def test_chat() -> None:
    done = run("generate", "--chat", "--temperature", "0", "Please say hello.")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give at least one PROMPT"),
        (("",), "is empty"),
        (("a", "--temperature", "nan"), "temperature is nan"),
        (("a", "--max-tokens", "0"), "max_tokens is 0"),
        (("a", "--top-p", "1.5"), "top_p is 1.5"),
        (("a", "--model", "no/such/folder"), "there is no model folder"),
        (("a", "--device", "tpu"), "device is 'tpu'"),
        (("a", "--temprature", "1"), "No such option"),
        (("word " * 3000,), "tokens; it must have from 1 to 1023"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = run("generate", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.lower().startswith("error")]) == 1


@pytest.mark.parametrize("command", [(), ("generate",), ("build",), ("info",)])
def test_help_teaches(command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0
    assert "Usage: minivllm" in done.stdout


def test_info_and_build() -> None:
    info = run("info")
    assert info.returncode == 0, info.stderr
    assert "rms_norm" in info.stdout
    build = run("build")
    assert build.returncode == 0, build.stderr
    assert build.stdout.strip().endswith(".so")
