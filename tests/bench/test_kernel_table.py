"""The table of kernels: goals judged the right way round, the best peer found, a README changed between marks alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import kernel_table


def benchmark(op: str, shape: str, way: str, us: float, **notes: object) -> dict[str, object]:
    told = {"op": op, "device": "cuda", "dtype": "bfloat16", "shape": shape, "way": way, "us": us}
    return {"extra_info": told | notes}


LIMITS = {"read": 4380.0, "copy": 4300.0, "matmul": 700_000.0, "bus": 50.0}
FAST = {"GB/s": 3700.0, "limit": "copy", "% of limit": 86.0, "limits": LIMITS}
PREFILL = "batch 4, tokens 4096, heads 32, kv_heads 8, head_dim 128"
BENCHMARKS = [
    benchmark("rms_norm", "rows 16384, hidden 1024", "minivllm", 18.0, **FAST),
    benchmark("rms_norm", "rows 16384, hidden 1024", "torch", 36.0),
    benchmark("rms_norm", "rows 16384, hidden 1024", "flashinfer", 20.0),
    benchmark("rms_norm", "rows 64, hidden 1024", "minivllm", 1.6, **FAST | {"GB/s": 160.0}),
    benchmark("flash_attention", PREFILL, "minivllm", 1000.0, **{"GFLOP/s": 340_000.0, "limit": "matmul"}),
    benchmark("sample", "rows 1, vocab 151936, filter greedy", "torch", 8.6),
    benchmark("rms_norm", "rows 64, hidden 1024", "torch", 5.0, device="cpu"),
]


def test_goals_are_times_at_most_and_rates_at_least() -> None:
    met = {(row.op, row.shape): row.met for row in kernel_table.rows_of(BENCHMARKS)}
    assert met == {
        ("rms_norm", "rows 16384, hidden 1024"): True,
        ("rms_norm", "rows 64, hidden 1024"): False,
        ("flash_attention", PREFILL): False,
        ("sample", "rows 1, vocab 151936, filter greedy"): None,
    }


def test_the_ratio_is_to_the_best_peer() -> None:
    row = kernel_table.rows_of(BENCHMARKS)[0]
    assert row.ratio == pytest.approx(20 / 18)
    assert "flashinfer 20.0 · torch 36.0" in kernel_table.markdown([row])


def test_every_goal_belongs_to_a_benchmark() -> None:
    files = Path(kernel_table.__file__).parent.glob("ops/bench_*.py")
    texts = "".join(file.read_text(encoding="utf-8") for file in files)
    for op, _ in kernel_table.GOALS:
        assert f'"{op}"' in texts, op


def test_the_command_writes_between_the_marks_alone(tmp_path: Path) -> None:
    measured, readme, table = (tmp_path / name for name in ("ops.json", "README.md", "table.json"))
    measured.write_text(json.dumps({"benchmarks": BENCHMARKS}), encoding="utf-8")
    begin, end = kernel_table.MARKS
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    arguments = [str(measured), "--json", str(table), "--readme", str(readme)]
    for _ in range(2):  # a second run replaces the first one's lines
        done = CliRunner().invoke(kernel_table.main, arguments, catch_exceptions=False)
        assert "1 of 3 goals met" in done.output
        text = readme.read_text(encoding="utf-8")
        assert text.startswith(f"before\n{begin}\n| op ") and text.endswith(f"{end}\nafter\n") and "old" not in text
        assert text.count("`rms_norm`") == 1
    rows = json.loads(table.read_text(encoding="utf-8"))["rows"]
    assert [row["us"] for row in rows] == [18.0, 1.6, 1000.0, None]


def test_a_readme_without_marks_is_an_error(tmp_path: Path) -> None:
    measured, readme = tmp_path / "ops.json", tmp_path / "README.md"
    measured.write_text(json.dumps({"benchmarks": BENCHMARKS}), encoding="utf-8")
    readme.write_text("no marks", encoding="utf-8")
    done = CliRunner().invoke(kernel_table.main, [str(measured), "--readme", str(readme)])
    assert done.exit_code == 1 and "lacks the marks" in done.output
    assert readme.read_text(encoding="utf-8") == "no marks"
