"""What the cache key of the compiled kernels is made of, and how architectures are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minivllm.ops import _toolchain


@pytest.fixture
def csrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    shutil.copytree(_toolchain.CSRC, folder)
    monkeypatch.setattr(_toolchain, "CSRC", folder)
    return folder


def keys() -> tuple[tuple[str, str], tuple[str, str]]:
    """Of a library for the CPU, and of one with CUDA kernels."""
    cxx = _toolchain.find_cxx()
    cuda = _toolchain.Target(cxx, None, ("9.0a",))
    return _toolchain.cache_key(_toolchain.Target(cxx, None, ())), _toolchain.cache_key(cuda)


def test_every_input_changes_the_key(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {keys()[0][0]}

    def is_new() -> bool:
        content = keys()[0][0]
        return content not in seen and not seen.add(content)

    assert keys()[0][0] in seen  # the same files give the same key
    source, header = csrc / "rms_norm.cpp", csrc / "common" / "cpu.h"
    source.write_text(source.read_text() + "// changed\n")
    assert is_new()
    header.write_text(header.read_text() + "// changed\n")
    assert is_new()
    source.rename(csrc / "renamed.cpp")
    assert is_new()
    (csrc / "added.h").touch()
    assert is_new()
    (csrc / "common" / "added.cpp").touch()
    assert is_new()
    monkeypatch.setattr(_toolchain, "CPU_FLAGS", (*_toolchain.CPU_FLAGS, "-DX"))
    assert is_new()
    monkeypatch.setattr(_toolchain, "_cpu_identity", lambda: "another CPU")
    assert is_new()
    monkeypatch.setattr(_toolchain.torch, "__version__", "9.9.9")
    assert is_new()


def test_cuda_sources_and_architectures_matter_to_cuda_alone(csrc: Path) -> None:
    cpu, cuda = keys()
    assert cpu[0] != cuda[0]
    (csrc / "rms_norm.cu").write_text("// changed\n")
    assert keys()[0] == cpu and keys()[1] != cuda
    two = _toolchain.Target(_toolchain.find_cxx(), None, ("8.6", "9.0a"))
    assert _toolchain.cache_key(two) != keys()[1]


def test_another_compiler_changes_the_second_part_of_the_key(tmp_path: Path) -> None:
    cxx = tmp_path / "c++"
    cxx.write_text("one")
    before = _toolchain.cache_key(_toolchain.Target(cxx, None, ()))
    cxx.write_text("another")
    after = _toolchain.cache_key(_toolchain.Target(cxx, None, ()))
    assert before[0] == after[0] and before[1] != after[1]


def test_architectures_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, archs in (("", ()), ("9.0a", ("9.0a",)), ("9.0a;8.6", ("8.6", "9.0a")), ("9.0a,8.6;", ("8.6", "9.0a"))):
        monkeypatch.setenv("MINIVLLM_CUDA_ARCHS", text)
        assert _toolchain.cuda_archs() == archs
    assert _toolchain.gencode("9.0a") == "-gencode=arch=compute_90a,code=sm_90a"
