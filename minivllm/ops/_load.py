"""Finds the compiled kernels at import, builds them if there are none yet, and remembers what serves the ops.

Order: CPU and CUDA kernels where this machine has a GPU, else CPU kernels alone, else the PyTorch references. Each step
down is one warning that says why and how to fix it; the ops stay the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minivllm.ops._toolchain import (
    DONE,
    BuildError,
    Target,
    cache_key,
    cuda_archs,
    find_cxx,
    find_nvcc,
    finished_library,
)


@dataclass(frozen=True)
class BuildInfo:
    """What serves the ops in this process."""

    kind: str  # "cuda" (CPU and CUDA kernels), "cpu" or "reference"
    reason: str = ""  # why not more: empty when nothing is missing
    library: Path | None = None
    facts: dict[str, object] = field(default_factory=dict)  # done.json of the build: compilers, architectures, seconds


def load() -> BuildInfo:
    """Load the kernels, building them first if needed. Called once, by `import minivllm.ops`."""
    mode = os.environ.get("MINIVLLM_OPS", "auto")
    if mode not in ("auto", "reference"):
        raise BuildError(f"MINIVLLM_OPS={mode!r} is not known; use auto or reference")
    if mode == "reference":
        return BuildInfo("reference", "MINIVLLM_OPS=reference")
    reasons: list[str] = []
    for target in _targets():
        try:
            library = compile_target(target)
            torch.ops.load_library(library)
        except (BuildError, OSError) as error:
            reasons.append(str(error))
            served = "the CPU kernels alone" if target.archs else "the PyTorch references (slow)"
            warnings.warn(f"minivllm.ops runs with {served}: {error}", RuntimeWarning, stacklevel=3)
            continue
        facts = json.loads(library.with_name(DONE).read_text(encoding="utf-8"))
        return BuildInfo(target.kind, "; ".join(reasons), library, facts)
    return BuildInfo("reference", "; ".join(reasons))


def compile_target(target: Target, *, verbose: bool = False, force: bool = False) -> Path:
    """Path of the compiled library for `target`, from the cache or built now.

    Raises:
        BuildError: it is not in the cache and cannot be built.
    """
    content, tools = cache_key(target)
    if not force:
        # Without a compiler any library of the same content will do: an image may have been built with one that is
        # gone.
        pattern = f"{content}-*" if target.cxx is None else f"{content}-{tools}"
        for root in filter(None, (_configured_root(), _private_temporary())):
            for folder in root.glob(pattern):
                if (library := finished_library(folder)) is not None:
                    return library
    from minivllm.ops import _build

    return _build.build(target, writable_root() / f"{content}-{tools}", verbose=verbose, force=force)


def default_target() -> Target:
    """The library that this machine should have."""
    archs = cuda_archs()
    return Target(find_cxx(), find_nvcc() if archs else None, archs)


def _targets() -> list[Target]:
    best = default_target()
    return [best, Target(best.cxx, None, ())] if best.archs else [best]


def _configured_root() -> Path | None:
    """Folder of compiled libraries: $MINIVLLM_CACHE_DIR, else $XDG_CACHE_HOME/minivllm, else ~/.cache/minivllm.

    None for a user without a home.
    """
    if own := os.environ.get("MINIVLLM_CACHE_DIR"):
        return Path(own) / "kernels"
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "minivllm" / "kernels"
    home = Path(os.path.expanduser("~"))  # stays "~" where neither HOME nor the user database knows one
    return home / ".cache" / "minivllm" / "kernels" if home.is_absolute() else None


def writable_root() -> Path:
    """The configured cache folder, or a private temporary one, with a warning, where that cannot be written."""
    root = _configured_root()
    why = "this user has no home folder"
    if root is not None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                return root
        except OSError as error:
            why = f"cannot write its cache folder {root} ({error.strerror})"
    with contextlib.suppress(OSError):
        _temporary_name().mkdir(mode=0o700)
    fallback = _private_temporary() or Path(tempfile.mkdtemp(prefix="minivllm-"))
    message = f"minivllm: {why}; compiled kernels go to {fallback}. Set MINIVLLM_CACHE_DIR to a writable folder"
    warnings.warn(message, RuntimeWarning, stacklevel=5)
    return fallback


def _temporary_name() -> Path:
    return Path(tempfile.gettempdir()) / f"minivllm-{os.getuid()}"


def _private_temporary() -> Path | None:
    """Our folder among the temporary ones, unless it is missing or another user could have put a library into it."""
    folder = _temporary_name()
    try:
        facts = folder.lstat()
    except OSError:
        return None
    private = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not facts.st_mode & 0o077
    return folder if private else None
