"""The command line on the bundled model: in a process of its own, and quicker without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from minivllm import LLM, SamplingParams
from minivllm.cli import cli, main


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
    num_tokens = sum(record["prompt_tokens"] for record in records)
    cached = f"prefix cache: 0 of {num_tokens} prompt tokens found (0.0%)"
    for word in ("tokens/s", "time to first token", "KV cache: at most 3 of", cached):
        assert word in done.stderr
    text = run("generate", "First", "Second", "--max-tokens", "5")
    assert "--- 1/2: First" in text.stdout
    assert "--- 2/2: Second" in text.stdout


def here(*arguments: str) -> str:
    """What `generate` prints, without a process of its own."""
    done = CliRunner().invoke(cli, ["generate", "--device", "cpu", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_every_continuation_is_printed() -> None:
    options = ("First", "Second", "--n", "2", "--seed", "3", "--max-tokens", "6")
    records = [json.loads(line) for line in here(*options, "--json").splitlines()]
    assert [record["prompt"] for record in records] == ["First", "Second"]
    lines = [
        line
        for place, record in enumerate(records, 1)
        for sample, output in enumerate(record["outputs"], 1)
        for line in (f"--- {place}/2, continuation {sample}/2: {record['prompt']}", output["text"])
    ]
    assert len(lines) == 8
    assert here(*options) == here(*options, "--no-stream") == "\n".join(lines) + "\n"
    assert records[0]["outputs"][0]["text"] == records[0]["text"] != records[0]["outputs"][1]["text"]


def test_options_of_the_draw_arrive() -> None:
    options = ("Once upon a time", "--temperature", "0", "--max-tokens", "12", "--json", "--logprobs", "2")
    free = json.loads(here(*options))
    assert [position[0]["id"] for position in free["logprobs"]] == free["token_ids"]
    assert all(len(position) == 2 and position[0]["rank"] == 1 for position in free["logprobs"])
    stop = free["text"][4:7]
    stopped = json.loads(here(*options, "--stop", "\u2603", "--stop", stop))
    assert stopped["text"] == free["text"][: free["text"].index(stop)]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", stop)


def test_penalties_arrive() -> None:
    prompt, num_tokens = "The old king", 40
    penalties = {"repetition_penalty": 1.5, "presence_penalty": 2.0, "frequency_penalty": 2.0}
    options = ("--temperature", "0", "--max-tokens", str(num_tokens), "--no-stream", prompt)
    printed = [here(*options), *(here(*options, f"--{name.replace('_', '-')}={penalties[name]}") for name in penalties)]
    each: list[dict[str, float]] = [{}, *({name: value} for name, value in penalties.items())]
    params = [SamplingParams(temperature=0.0, max_tokens=num_tokens, **one) for one in each]
    with LLM(device="cpu", num_kv_blocks=64) as llm:
        outputs = llm.generate([prompt] * 4, params)
    assert printed == [output.text + "\n" for output in outputs]
    assert len(set(printed)) > 2, "the penalties change nothing here; take another prompt"


def test_a_trace_is_written(tmp_path: Path) -> None:
    here("First", "--max-tokens", "4", "--trace", str(tmp_path / "run.json"))
    events = json.loads((tmp_path / "run.json").read_text())
    assert len([event for event in events if event["name"] == "schedule"]) == 4


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
        (("a", "--n", "0"), "n is 0"),
        (("a", "--logprobs", "1"), "--logprobs are printed with --json only"),
        (("word " * 3000,), "tokens; it must have from 1 to 1023"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["minivllm", "generate", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    told = capsys.readouterr().err
    assert end.value.code == 2
    assert message in told
    assert len([line for line in told.splitlines() if line.lower().startswith("error")]) == 1


def test_a_process_ends_with_the_error() -> None:
    done = run("generate", "")
    assert done.returncode == 2
    assert done.stderr == "error: prompts[0] is empty; give at least one character or token\n"


@pytest.mark.parametrize("command", [(), ("generate",), ("build",), ("info",)])
def test_help_teaches(command: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, [*command, "--help"], prog_name="minivllm")
    assert done.exit_code == 0
    assert "Usage: minivllm" in done.stdout


def test_info_and_build() -> None:
    info = run("info")
    assert info.returncode == 0, info.stderr
    assert "rms_norm" in info.stdout
    build = run("build")
    assert build.returncode == 0, build.stderr
    assert build.stdout.strip().endswith(".so")
