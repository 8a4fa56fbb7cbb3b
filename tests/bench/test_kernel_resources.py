"""What ptxas says about each kernel is read right, and a spill makes the script fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "kernel_resources.py"
LINES = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8minivllm5firstEPf' for 'sm_80'
ptxas info    : Function properties for _ZN8minivllm5firstEPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 512 bytes smem, 452 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN8minivllm6secondEPf' for 'sm_90a'
ptxas info    : Function properties for _ZN8minivllm6secondEPf
    48 bytes stack frame, {stores} bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
"""


def run(log: Path) -> tuple[int, list[list[str]]]:
    done = subprocess.run([sys.executable, str(SCRIPT), str(log)], capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.returncode, [line.split()[:6] for line in done.stdout.splitlines()[1:-1]]


def test_kernels_are_told_with_their_spills_first(tmp_path: Path) -> None:
    log = tmp_path / "norm.cu.80.log"
    log.write_text(LINES.format(stores=4), encoding="utf-8")
    code, rows = run(log)
    assert code == 1
    assert rows == [["norm", "90a", "255", "0", "48", "12"], ["norm", "80", "30", "512", "0", "0"]]


def test_without_spills_it_succeeds(tmp_path: Path) -> None:
    log = tmp_path / "norm.cu.80.log"
    log.write_text(
        LINES.format(stores=4).replace("4 bytes spill stores, 8", "0 bytes spill stores, 0"), encoding="utf-8"
    )
    assert run(log)[0] == 0


def test_a_kernel_may_spill_as_much_as_it_is_told(tmp_path: Path) -> None:
    log = tmp_path / "sample_filter.cu.80.log"
    text = LINES.format(stores=4).replace("6second", "13finish_kernel")
    log.write_text(text, encoding="utf-8")
    assert run(log)[0] == 0
    log.write_text(text.replace("48 bytes stack", "52 bytes stack"), encoding="utf-8")
    assert run(log)[0] == 1
