"""Compiles the kernels once, with progress, under a lock that a killed builder cannot leave behind.

`torch.utils.cpp_extension.load` does the compiling. Its own lock is a plain file that outlives its owner, so ours is an
`flock` on a file beside the folder of the library (the kernel drops it with the process). Each build has its own folder
and is renamed into place when complete: compilers that outlive a killed builder write where nobody looks. Imported only
when there is something to build.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch.utils import cpp_extension

from minivllm.ops._toolchain import (
    CPU_FLAGS,
    CSRC,
    CUDA_DEFINES,
    CUDA_FLAGS,
    DONE,
    LIBRARY,
    BuildError,
    Nvcc,
    Target,
    finished_library,
    gencode,
    sources,
)

# C++ files are compiled together in so many units: of a small one alone, most time goes into PyTorch's headers. Four
# keep a few cores busy, and beside nvcc the units are not what a build waits for.
_CPP_UNITS = 4
_console = Console(stderr=True)


def build(target: Target, folder: Path, *, verbose: bool = False, force: bool = False) -> Path:
    """Compile `target` into `folder` unless another process has done so meanwhile; returns the library's path.

    Raises:
        BuildError: no compiler, an nvcc that does not fit torch, or a failed compilation (the compiler's words
        included).
    """
    _require_tools(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        library = finished_library(folder)
        if library is not None and not force:
            return library
        for stale in folder.parent.glob(f"building-{folder.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        work = folder.with_name(f"building-{folder.name}-{time.time_ns()}")
        work.mkdir()
        start = time.monotonic()
        _compile(target, work, verbose)
        _write_done(work, target, time.monotonic() - start)
        shutil.rmtree(folder, ignore_errors=True)
        work.rename(folder)
        return folder / f"{LIBRARY}.so"


def _require_tools(target: Target) -> None:
    if target.cxx is None:
        name = os.environ.get("CXX", "c++")
        raise BuildError(
            f"no C++ compiler: `{name}` is not on PATH. Install g++ (Debian, Ubuntu: apt install g++) or set CXX"
        )
    if not target.archs:
        return
    if target.nvcc is None:
        raise BuildError(
            "no CUDA compiler: nvcc is neither under CUDA_HOME, nor on PATH, nor installed from PyPI. "
            "Run `pip install 'minivllm[cuda]'` or set CUDA_HOME"
        )
    _require_same_cuda(target.nvcc)


def _require_same_cuda(nvcc: Nvcc) -> None:
    text = subprocess.run([nvcc.path, "--version"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"release (\d+)\.(\d+)", text)
    if match is None:
        raise BuildError(f"{nvcc.path} (found by {nvcc.found_by}) does not answer --version like nvcc")
    wanted = (torch.version.cuda or "none").split(".")[0]
    if torch.version.cuda is None or match.group(1) != wanted:
        raise BuildError(
            f"{nvcc.path} (found by {nvcc.found_by}) is CUDA {match.group(1)}.{match.group(2)}, but torch "
            f"{torch.__version__} was built with CUDA {torch.version.cuda}. Set CUDA_HOME to a CUDA {wanted} toolkit"
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder.with_name(folder.name + ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _console.print("minivllm: another process is compiling the kernels; waiting for it", soft_wrap=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(target: Target, folder: Path, verbose: bool) -> None:
    files = sources(bool(target.archs))
    units = [*_write_units(folder, files), *(path for path in files if path.suffix != ".cpp")]
    arguments: dict[str, object] = {
        "name": LIBRARY,
        "sources": [str(path) for path in units],
        "extra_cflags": [*CPU_FLAGS, *(CUDA_DEFINES if target.archs else ())],
        "extra_include_paths": [str(CSRC)],
        "build_directory": str(folder),
        "is_python_module": False,
        "verbose": verbose,
        "with_cuda": bool(target.archs),
    }
    if target.archs:
        assert target.nvcc is not None
        arguments["extra_cuda_cflags"] = [*CUDA_FLAGS, *(gencode(arch) for arch in target.archs)]
        arguments["extra_ldflags"] = [f"-L{_cudart_folder(target.nvcc, folder)}"]
    what = "CPU" if not target.archs else "CPU and CUDA " + ", ".join(target.archs)
    with (
        _cuda_home(target.nvcc),
        _scripts_on_path(),
        _progress(folder, len(units), f"compiling {len(files)} kernel files for {what}", verbose),
    ):
        try:
            cpp_extension.load(**arguments)  # type: ignore[arg-type]
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise BuildError(f"compiling the kernels failed in {folder}:\n{error}") from error


def _write_units(folder: Path, files: list[Path]) -> list[Path]:
    """Files that include the C++ files among `files`, about as many bytes each; always the same ones together."""
    units: list[list[Path]] = [[] for _ in range(_CPP_UNITS)]
    for path in sorted((path for path in files if path.suffix == ".cpp"), key=lambda path: -path.stat().st_size):
        min(units, key=lambda unit: sum(other.stat().st_size for other in unit)).append(path)
    written = []
    for i, unit in enumerate(unit for unit in units if unit):
        written.append(folder / f"unit{i}.cpp")
        written[-1].write_text("".join(f'#include "{path.relative_to(CSRC)}"\n' for path in unit))
    return written


def _cudart_folder(nvcc: Nvcc, folder: Path) -> Path:
    """Where the linker finds libcudart.so; the PyPI wheels have only a versioned file, which gets a link of the plain
    name."""
    for name in ("lib64", "lib"):
        if (nvcc.home / name / "libcudart.so").exists():
            return nvcc.home / name
    versioned = sorted(nvcc.home.glob("lib*/libcudart.so.*"))
    if not versioned:
        raise BuildError(f"no libcudart.so under {nvcc.home}; install the CUDA runtime (pip install 'minivllm[cuda]')")
    links = folder / "link"
    links.mkdir(exist_ok=True)
    link = links / "libcudart.so"
    link.unlink(missing_ok=True)
    link.symlink_to(versioned[0])
    return links


@contextlib.contextmanager
def _cuda_home(nvcc: Nvcc | None) -> Iterator[None]:
    """Makes cpp_extension use the compiler that we found; it reads CUDA_HOME once, at its import."""
    before = cpp_extension.CUDA_HOME
    if nvcc is not None:
        cpp_extension.CUDA_HOME = str(nvcc.home)
    try:
        yield
    finally:
        cpp_extension.CUDA_HOME = before


@contextlib.contextmanager
def _scripts_on_path() -> Iterator[None]:
    """Makes cpp_extension find the ninja installed beside this Python, whose environment need not be activated."""
    before = os.environ.get("PATH", os.defpath)
    os.environ["PATH"] = before + os.pathsep + sysconfig.get_path("scripts")
    try:
        yield
    finally:
        os.environ["PATH"] = before


@contextlib.contextmanager
def _progress(folder: Path, num_files: int, what: str, verbose: bool) -> Iterator[None]:
    """A line that counts object files and seconds on a terminal, two plain lines elsewhere, nothing beside a verbose
    build."""
    start = time.monotonic()
    if verbose or not _console.is_terminal:
        _console.print(
            f"minivllm: {what} (once; later imports load them from the cache)", highlight=False, soft_wrap=True
        )
        yield
        _console.print(f"minivllm: compiled in {time.monotonic() - start:.1f} s", highlight=False, soft_wrap=True)
        return
    stop = threading.Event()
    columns = (SpinnerColumn(), TextColumn("minivllm: {task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console, transient=True) as progress:
        task = progress.add_task(f"{what} (once)", total=num_files + 1)

        def watch() -> None:
            while not stop.wait(0.2):
                progress.update(task, completed=len(list(folder.glob("*.o"))))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
    _console.print(f"minivllm: {what}: {time.monotonic() - start:.1f} s", highlight=False, soft_wrap=True)


def _write_done(folder: Path, target: Target, seconds: float) -> None:
    for left in (*folder.glob("*.o"), *folder.glob("unit*.cpp")):
        left.unlink()
    (built,) = folder.glob("*.so")  # the second build of one process gets a version in its name
    library = built.rename(folder / f"{LIBRARY}.so")
    facts = {
        "torch": torch.__version__,
        "kind": target.kind,
        "archs": list(target.archs),
        "cxx": str(target.cxx),
        "nvcc": str(target.nvcc.path) if target.nvcc else None,
        "seconds": round(seconds, 1),
        "bytes": library.stat().st_size,
    }
    (folder / DONE).write_text(json.dumps(facts, indent=1), encoding="utf-8")
