"""The JIT build, in fresh processes that import a copy of `minivllm.ops` with a csrc of its own and a cache of its own.

Most copies have one C++ file that compiles at once, because these tests are about when and where something is built;
the copy of the fixture `compiled` has a real kernel.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minivllm.ops import BuildError, _build, _toolchain
from minivllm.ops._load import writable_root

PACKAGE = Path(_toolchain.__file__).resolve().parents[1]
REAL_CXX = shutil.which("c++")
MISSING = "/nonexistent/c++"
BUILDS = "minivllm: compiling"
REPORT = """
import json, torch
from minivllm import ops
info = ops.build_info()
y = ops.rms_norm(torch.arange(1.0, 9.0).view(2, 4), torch.ones(4), 1e-6)
report = {"kind": info.kind, "reason": info.reason, "library": str(info.library), "y": y.flatten().tolist()}
print(json.dumps(report))
"""

pytestmark = pytest.mark.skipif(REAL_CXX is None, reason="needs a C++ compiler")


@dataclass
class Copy:
    """A copy of the package under `root` and the environment of the processes that import it."""

    root: Path
    env: dict[str, str]

    @property
    def csrc(self) -> Path:
        return self.root / "minivllm" / "csrc"

    @property
    def kernels(self) -> Path:
        return Path(self.env["MINIVLLM_CACHE_DIR"]) / "kernels"

    def libraries(self) -> list[Path]:
        return sorted(self.kernels.glob("*/minivllm_kernels.so"))

    def start(self, code: str = REPORT, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.root, env=self.env | env, stdout=pipe, stderr=pipe, text=True)

    def run(self, code: str = REPORT, **env: str) -> tuple[dict[str, Any], str]:
        return finish(self.start(code, **env))


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
    """The process's report and what it said on stderr, in one line."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out), " ".join(err.split())


def make_copy(root: Path) -> Copy:
    package = root / "minivllm"
    package.mkdir()
    shutil.copy(PACKAGE / "__init__.py", package)
    shutil.copytree(PACKAGE / "ops", package / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "csrc").mkdir()
    ours = ("MINIVLLM_", "CXX", "CUDA_", "TORCH_", "XDG_", "PYTHON")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    temporary = root / "tmp"
    temporary.mkdir()
    env |= {"PYTHONPATH": str(root), "MINIVLLM_CACHE_DIR": str(root / "cache"), "MINIVLLM_CUDA_ARCHS": ""}
    env |= {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    return Copy(root, env)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    """Compiles one file without torch's headers in a moment."""
    made = make_copy(tmp_path)
    (made.csrc / "marker.cpp").write_text('extern "C" int minivllm_marker() { return 1; }\n')
    return made


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Copy, dict[str, Any], str]:
    """A copy with the real rms_norm kernel, after its first import: the copy, its report, its stderr."""
    made = make_copy(tmp_path_factory.mktemp("compiled"))
    shutil.copytree(PACKAGE / "csrc" / "common", made.csrc / "common")
    for name in ("rms_norm.cpp", "rms_norm.h"):
        shutil.copy(PACKAGE / "csrc" / name, made.csrc)
    return (made, *made.run())


def write_cxx(copy: Copy, before_compiling: str) -> str:
    """A compiler that logs each compilation and runs shell lines before it; all else goes to the real one at once."""
    script = copy.root / "cxx"
    log = copy.root / "compilations"
    compiling = f'case " $* " in *" -c "*) echo compile >> {log}\n{before_compiling}\n;; esac'
    script.write_text(f'#!/bin/sh\n{compiling}\nexec {REAL_CXX} "$@"\n')
    script.chmod(0o755)
    return str(script)


def num_compilations(copy: Copy) -> int:
    log = copy.root / "compilations"
    return len(log.read_text().split()) if log.exists() else 0


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


# ---- when something is built ----


def test_importing_the_package_builds_nothing_and_needs_no_torch(copy: Copy) -> None:
    code = "import sys, json, minivllm; print(json.dumps({'torch': 'torch' in sys.modules}))"
    report, err = copy.run(code)
    assert report == {"torch": False} and err == ""
    assert not copy.kernels.exists()


def test_first_import_builds(compiled: tuple[Copy, dict[str, Any], str]) -> None:
    copy, report, err = compiled
    assert err.count(BUILDS) == 1 and "minivllm: compiled in" in err and "Warning" not in err
    assert report["kind"] == "cpu" and report["reason"] == ""
    (library,) = copy.libraries()
    assert report["library"] == str(library)
    facts = json.loads(library.with_name("done.json").read_text())
    assert facts["kind"] == "cpu" and facts["cxx"] == REAL_CXX and facts["bytes"] == library.stat().st_size
    assert not list(copy.kernels.glob("building-*")) and not list(library.parent.glob("*.o"))


def test_second_import_loads_silently_without_the_machinery(compiled: tuple[Copy, dict[str, Any], str]) -> None:
    copy, first, _ = compiled
    machinery = "import sys; assert 'torch.utils.cpp_extension' not in sys.modules; assert 'rich' not in sys.modules"
    timed = (
        "import torch, time; start = time.perf_counter(); import minivllm.ops; seconds = time.perf_counter() - start"
    )
    report, err = copy.run(f"{timed}\n{REPORT}\n{machinery}\nassert seconds < 1.0, seconds")
    assert report == first and err == ""


def test_compiled_kernels_and_references_agree(compiled: tuple[Copy, dict[str, Any], str]) -> None:
    copy, first, _ = compiled
    report, err = copy.run(MINIVLLM_OPS="reference")
    assert err == "" and report["kind"] == "reference" and "MINIVLLM_OPS" in report["reason"]
    assert first["y"] == pytest.approx(report["y"], rel=1e-6)


def test_cached_library_serves_when_the_compiler_is_gone(compiled: tuple[Copy, dict[str, Any], str]) -> None:
    copy, first, _ = compiled
    assert copy.run(CXX=MISSING) == (first, "")


def test_reference_mode_builds_nothing(copy: Copy) -> None:
    report, err = copy.run(MINIVLLM_OPS="reference")
    assert report["kind"] == "reference" and err == ""
    assert not copy.kernels.exists()


def test_unknown_mode_is_an_error(copy: Copy) -> None:
    process = copy.start(MINIVLLM_OPS="fast")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "BuildError: MINIVLLM_OPS='fast' is not known; use auto or reference" in err


# ---- when it cannot be built ----


def test_without_a_compiler_the_references_serve(copy: Copy) -> None:
    report, err = copy.run(CXX=MISSING)
    assert report["kind"] == "reference" and report["y"][0] == pytest.approx(1 / 7.5**0.5)
    assert err.count("RuntimeWarning") == 1 and "PyTorch references" in err
    assert f"`{MISSING}` is not on PATH. Install g++" in err and "set CXX" in err and report["reason"] in err
    assert copy.libraries() == []


def test_a_failing_compiler_is_quoted_and_the_next_import_tries_again(copy: Copy) -> None:
    broken = copy.root / "broken"
    cxx = write_cxx(copy, f"if [ -e {broken} ]; then echo the disk is made of cheese >&2; exit 1; fi")
    broken.touch()
    report, err = copy.run(CXX=cxx)
    assert report["kind"] == "reference" and err.count("RuntimeWarning") == 1
    assert "the disk is made of cheese" in err and "the disk is made of cheese" in report["reason"]
    assert copy.libraries() == []
    broken.unlink()
    report, err = copy.run(CXX=cxx)
    assert report["kind"] == "cpu" and "Warning" not in err
    assert not list(copy.kernels.glob("building-*"))


def test_without_nvcc_the_cpu_kernels_serve(copy: Copy) -> None:
    path = os.pathsep.join(str(Path(tool).parent) for tool in (REAL_CXX, shutil.which("ninja")) if tool)
    no_wheel = (
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'nvidia' else f(n, *a)"
    )
    report, err = copy.run(f"{no_wheel}\n{REPORT}", MINIVLLM_CUDA_ARCHS="9.0a", PATH=path)
    assert report["kind"] == "cpu" and "no CUDA compiler" in report["reason"]
    assert err.count("RuntimeWarning") == 1 and "the CPU kernels alone" in err and "minivllm[cuda]" in err


def test_nvcc_of_another_cuda_is_named(copy: Copy) -> None:
    nvcc = copy.root / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 3.1, V3.1.0\n")
    nvcc.chmod(0o755)
    report, err = copy.run(MINIVLLM_CUDA_ARCHS="9.0a", CUDA_HOME=str(nvcc.parents[1]))
    assert report["kind"] == "cpu" and "found by CUDA_HOME) is CUDA 3.1, but torch" in report["reason"]
    assert err.count("RuntimeWarning") == 1


# ---- several processes, and killed ones ----


def test_two_processes_at_once_build_once(copy: Copy) -> None:
    cxx = write_cxx(copy, "sleep 2")
    processes = [copy.start(CXX=cxx) for _ in range(2)]
    (first, first_err), (second, second_err) = (finish(process) for process in processes)
    assert first == second and first["kind"] == "cpu"
    assert num_compilations(copy) == 1 and len(list(copy.kernels.glob("*/done.json"))) == 1
    assert (first_err + second_err).count(BUILDS) == 1
    assert (first_err + second_err).count("another process is compiling the kernels; waiting for it") == 1


def test_a_killed_builder_blocks_nobody_and_its_compiler_harms_nothing(copy: Copy) -> None:
    """The killed process's ninja and compiler live on; they must not write over the library that others load."""
    slow, sleeping, awake = (copy.root / name for name in ("slow", "sleeping", "awake"))
    slow.touch()
    cxx = write_cxx(copy, f"if [ -e {slow} ]; then rm {slow}; touch {sleeping}; sleep 4; touch {awake}; fi")
    with copy.start(CXX=cxx) as killed:
        wait_for(sleeping)
        killed.send_signal(signal.SIGKILL)
    report, err = copy.run(CXX=cxx)
    assert report["kind"] == "cpu" and err.count(BUILDS) == 1 and "waiting" not in err
    (library,) = copy.libraries()
    before = library.stat()
    wait_for(awake)
    time.sleep(0.7)  # the left-over compiler and linker need 0.2 s
    assert copy.libraries() == [library] and library.stat() == before
    assert not list(copy.kernels.glob("building-*"))


def test_a_half_made_folder_with_torchs_lock_is_built_again(copy: Copy) -> None:
    target = "from minivllm.ops._load import default_target; from minivllm.ops._toolchain import cache_key"
    code = f"import json; {target}; print(json.dumps({{'folder': '-'.join(cache_key(default_target()))}}))"
    folder = copy.kernels / copy.run(code, MINIVLLM_OPS="reference")[0]["folder"]
    folder.mkdir(parents=True)
    (folder / "lock").touch()
    (folder / "minivllm_kernels.so").write_bytes(b"half a library")
    stale = folder.with_name(f"building-{folder.name}-1")
    stale.mkdir()
    report, err = copy.run()
    assert report["kind"] == "cpu" and err.count(BUILDS) == 1
    assert report["library"] == str(folder / "minivllm_kernels.so") and not (folder / "lock").exists()
    assert not stale.exists()


def test_one_process_can_build_twice(copy: Copy) -> None:
    """torch renames the second library of a process; ours keeps its name (a CPU build may follow a failed CUDA one)."""
    code = f"""
from pathlib import Path
from minivllm.ops._load import compile_target, default_target
first = compile_target(default_target())
inode = first.stat().st_ino
assert compile_target(default_target(), force=True) == first and first.stat().st_ino != inode
Path({str(copy.csrc)!r}, "marker.cpp").write_text("int other;")
second = compile_target(default_target())
assert second != first and second.name == first.name and second.is_file()
{REPORT}"""
    report, err = copy.run(code)
    assert report["kind"] == "cpu" and err.count(BUILDS) == 3
    assert len(copy.libraries()) == 2


# ---- where it is built ----


def test_an_unwritable_cache_gives_a_private_temporary_folder(copy: Copy) -> None:
    blocked = copy.root / "file"
    blocked.touch()
    private = copy.root / "tmp" / f"minivllm-{os.getuid()}"
    report, err = copy.run(MINIVLLM_CACHE_DIR=str(blocked / "cache"))
    assert report["kind"] == "cpu" and Path(report["library"]).is_relative_to(private)
    assert err.count("RuntimeWarning") == 1 and f"compiled kernels go to {private}" in err
    assert str(blocked / "cache") in err and "Set MINIVLLM_CACHE_DIR to a writable folder" in err
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert copy.run(MINIVLLM_CACHE_DIR=str(blocked / "cache")) == (report, "")  # found there, and quietly


def test_a_temporary_folder_open_to_others_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("MINIVLLM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    taken = tmp_path / f"minivllm-{os.getuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="cannot write its cache folder"):
        fallback = writable_root()
    assert fallback != taken and fallback.parent == tmp_path and stat.S_IMODE(fallback.stat().st_mode) == 0o700
    taken.chmod(0o700)
    with pytest.warns(RuntimeWarning, match="cannot write its cache folder"):
        assert writable_root() == taken


def test_looking_into_the_cache_leaves_nothing_behind(copy: Copy) -> None:
    (copy.root / "tmp" / f"minivllm-{os.getuid()}").mkdir(mode=0o755)
    before = sorted((copy.root / "tmp").iterdir())
    copy.run(CXX=MISSING)
    assert sorted((copy.root / "tmp").iterdir()) == before


def test_a_user_without_a_home_builds_in_a_private_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MINIVLLM_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what Python does for a user it does not know
    with pytest.warns(RuntimeWarning, match="no home folder"):
        assert writable_root() == tmp_path / f"minivllm-{os.getuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert writable_root() == tmp_path / "xdg" / "minivllm" / "kernels"
    monkeypatch.setenv("MINIVLLM_CACHE_DIR", str(tmp_path / "own"))
    assert writable_root() == tmp_path / "own" / "kernels"


def test_ninja_beside_python_is_found_without_its_folder_on_the_path(copy: Copy) -> None:
    beside = Path(sys.executable).parent / "ninja"
    if not beside.exists():
        pytest.skip("ninja is not installed beside this Python")
    tools = copy.root / "tools"
    tools.mkdir()
    for name in ("c++", "as", "ld", "collect2", "which", "sh"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    report, err = copy.run(PATH=str(tools))
    assert report["kind"] == "cpu" and err.count(BUILDS) == 1, err


def test_build_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        _build.build(_toolchain.Target(None, None, ()), tmp_path / "a")
    with pytest.raises(BuildError, match="no CUDA compiler"):
        _build.build(_toolchain.Target(_toolchain.find_cxx(), None, ("9.0a",)), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
