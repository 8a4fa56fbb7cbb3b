"""What the kernels are compiled from, with and for: sources, compilers, flags, architectures, and the cache key made of
them.

Everything here is cheap (file stats, one hash, NVML instead of a CUDA context), because it runs at every import to find
the cached library. Compilers are identified by path, size and modification time rather than by running them.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"

# TORCH_TARGET_VERSION limits the stable-ABI headers to what torch 2.10 has, so newer headers compile to the same calls.
_COMMON_FLAGS = ("-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# No -ffast-math: NaN and infinity keep their meaning. The two -fno flags only drop errno and trap bookkeeping, which
# blocks vectorising.
CPU_FLAGS = (
    *_COMMON_FLAGS,
    "-march=native",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
)
CUDA_FLAGS = ("-O3", "--expt-relaxed-constexpr", "--extended-lambda")
CUDA_DEFINES = ("-DMINIVLLM_CUDA", "-DUSE_CUDA")


# A folder of the cache holds the library and, written last, the facts of its build.
LIBRARY = "minivllm_kernels"
DONE = "done.json"


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the text says why and how to fix it."""


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: `home` has bin/nvcc, include/ and lib/ or lib64/."""

    home: Path
    found_by: str

    @property
    def path(self) -> Path:
        return self.home / "bin" / "nvcc"


@dataclass(frozen=True)
class Target:
    """One library to build: for the CPU alone, or for the CPU and the CUDA architectures in `archs` (such as
    "9.0a")."""

    cxx: Path | None
    nvcc: Nvcc | None
    archs: tuple[str, ...]

    @property
    def kind(self) -> str:
        return "cuda" if self.archs else "cpu"


def sources(with_cuda: bool) -> list[Path]:
    """The files that are compiled, in a fixed order."""
    patterns = ("*.cpp", "*.cu") if with_cuda else ("*.cpp",)
    return sorted(path for pattern in patterns for path in CSRC.rglob(pattern))


def find_cxx() -> Path | None:
    """The C++ compiler that torch.utils.cpp_extension will use: $CXX, then c++."""
    name = os.environ.get("CXX", "c++")
    found = shutil.which(name)
    return Path(found) if found else None


def find_nvcc() -> Nvcc | None:
    """nvcc from CUDA_HOME (or CUDA_PATH), then PATH, then the PyPI wheels of the extra `cuda`."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").is_file():
            return Nvcc(Path(home), variable)
    found = shutil.which("nvcc")
    if found:
        return Nvcc(Path(found).resolve().parents[1], "PATH")
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for nvcc in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True):
            return Nvcc(nvcc.parents[1], "the nvidia-cuda-nvcc wheel")
    return None


def cuda_archs() -> tuple[str, ...]:
    """Architectures of this machine's GPUs as nvcc's names without the dot's left-out ("9.0a", "8.6"), or () without a
    GPU.

    MINIVLLM_CUDA_ARCHS ("9.0a;8.6") overrides what is found, so that an image can be built on a machine without a GPU;
    an empty value means no CUDA.
    """
    override = os.environ.get("MINIVLLM_CUDA_ARCHS")
    if override is not None:
        return tuple(sorted(word for word in override.replace(",", ";").split(";") if word))
    if torch.version.cuda is None:
        return ()
    capabilities = _nvml_capabilities()
    return tuple(sorted({f"{major}.{minor}" + ("a" if major >= 9 else "") for major, minor in capabilities}))


def gencode(arch: str) -> str:
    """nvcc's flag for one architecture: machine code only, no PTX."""
    digits = arch.replace(".", "")
    return f"-gencode=arch=compute_{digits},code=sm_{digits}"


def cache_key(target: Target) -> tuple[str, str]:
    """(what the library is, what built it) as two short hashes; together they name its folder in the cache."""
    digest = hashlib.sha256()
    for path in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *sources(bool(target.archs))]):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    content = (
        torch.__version__,
        torch.version.cuda,
        CPU_FLAGS,
        CUDA_FLAGS,
        CUDA_DEFINES,
        target.archs,
        _cpu_identity(),
    )
    digest.update(repr(content).encode())
    tools = repr([_file_identity(target.cxx), _file_identity(target.nvcc.path if target.nvcc else None)])
    return digest.hexdigest()[:16], hashlib.sha256(tools.encode()).hexdigest()[:8]


def finished_library(folder: Path) -> Path | None:
    """The library in a folder of the cache; None where its build never finished or the file was damaged since."""
    library = folder / f"{LIBRARY}.so"
    try:
        facts = json.loads((folder / DONE).read_text(encoding="utf-8"))
        return library if library.stat().st_size == facts["bytes"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file_identity(path: Path | None) -> tuple[str, int, int] | None:
    if path is None:
        return None
    stat = path.resolve().stat()
    return str(path), stat.st_size, stat.st_mtime_ns


def _cpu_identity() -> str:
    """Instruction sets of this CPU, because -march=native compiles for them."""
    wanted: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in ("model name", "flags", "CPU implementer", "CPU part", "Features"):  # x86; Arm
                    wanted[name.strip()] = value.strip()
                if not line.strip():  # the first core's paragraph ends
                    break
    except OSError:
        return platform.machine()
    return repr(wanted)


def _nvml_capabilities() -> list[tuple[int, int]]:
    """Compute capability of every GPU, read through NVML, which needs no CUDA context and survives a later fork."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return _torch_capabilities()
    if nvml.nvmlInit_v2() != 0:
        return _torch_capabilities()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return _torch_capabilities()
        return [pair for index in range(count.value) if (pair := _nvml_capability(nvml, index)) is not None]
    finally:
        nvml.nvmlShutdown()


def _nvml_capability(nvml: ctypes.CDLL, index: int) -> tuple[int, int] | None:
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
        return None
    if nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor)) != 0:
        return None
    return major.value, minor.value


def _torch_capabilities() -> list[tuple[int, int]]:
    """Without NVML (a container with the driver's compute part alone) torch is asked, which is slower."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
