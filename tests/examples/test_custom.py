"""The examples that use the op library run as they stand, each in its own process; they check their own results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAST_WORDS = {"custom_model": "== plain PyTorch", "custom_op": "kernel, reference and torch.compile agree"}


@pytest.mark.parametrize("name", LAST_WORDS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert LAST_WORDS[name] in done.stdout


@pytest.mark.parametrize("name", LAST_WORDS)
def test_example_is_short(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60
