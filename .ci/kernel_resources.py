"""Tabulates what ptxas reported: registers, shared memory, stack and spills of every kernel on every architecture.

    python .ci/kernel_resources.py LOG ...

Each LOG holds what `nvcc -Xptxas -v` printed for one file. Kernels that spill are listed first; beyond what TOLERATED
allows they make it exit with 1.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")

# Bytes of stack that a kernel may spill to, and why that is cheaper than the cure.
TOLERATED = {
    r"finish_kernel": 48,  # sampling: a few words outside its loops; with more registers only one block fits an SM
    r"decode_kernel.*256": 48,  # sums of 256 elements and the next row; 24 bytes on sm_90a; elsewhere nothing spills
}


@dataclass
class Kernel:
    file: str
    name: str
    arch: str
    registers: int = 0
    shared: int = 0  # bytes, static; what a launch asks for dynamically is not known here
    stack: int = 0
    spilled: int = 0  # bytes stored and loaded


def kernels_of(log: Path) -> list[Kernel]:
    """The kernels of one log; the lines of a kernel follow the one that names it."""
    found: list[Kernel] = []
    for line in log.read_text(encoding="utf-8").splitlines():
        if match := ENTRY.search(line):
            found.append(Kernel(log.name.partition(".cu")[0], match[1], match[2]))
        elif found and (match := FRAME.search(line)):
            found[-1].stack, found[-1].spilled = int(match[1]), int(match[2]) + int(match[3])
        elif found and (match := USED.search(line)):
            shared = SHARED.search(line)
            found[-1].registers, found[-1].shared = int(match[1]), int(shared[1]) if shared else 0
    return found


def short_names(kernels: list[Kernel]) -> None:
    """C++ names without arguments and namespaces, where a demangler is at hand."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not kernels:
        return
    words = subprocess.run(
        [tool], input="\n".join(kernel.name for kernel in kernels), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for kernel, name in zip(kernels, words, strict=True):
        name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|minivllm::|^void |__nv_", "", name)
        kernel.name = re.sub(r"\((?:int|bool|long)\)", "", name).split("(")[0]


def tolerated(kernel: Kernel) -> int:
    return next((limit for pattern, limit in TOLERATED.items() if re.search(pattern, kernel.name)), 0)


def main() -> int:
    kernels = [kernel for log in sys.argv[1:] for kernel in kernels_of(Path(log))]
    short_names(kernels)
    spilling = [kernel for kernel in kernels if kernel.spilled]
    too_much = [kernel for kernel in spilling if kernel.stack > tolerated(kernel)]
    print(f"{'file':<18} {'arch':<5} {'regs':>4} {'smem':>6} {'stack':>5} {'spilled':>7}  kernel")
    for kernel in sorted(kernels, key=lambda k: (not k.spilled, k.file, k.name, k.arch)):
        sizes = f"{kernel.registers:>4} {kernel.shared:>6} {kernel.stack:>5} {kernel.spilled:>7}"
        print(f"{kernel.file:<18} {kernel.arch:<5} {sizes}  {kernel.name}")
    print(f"{len(kernels)} kernels, {len(spilling)} with spilled registers, {len(too_much)} beyond what is tolerated")
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
