"""The laws of the house (README, "The house"), checked with `ast` and the file system."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minivllm"
FILES = sorted(PACKAGE.rglob("*.py"))

# Rooms from the ground up: a module imports from its own room and from rooms on lower floors. A type may be named
# upwards.
FLOORS = [
    {"errors"},
    {"options", "lazy_heap"},
    {"sampling_params", "config", "hub"},
    {"batch"},
    {"request"},
    {"cache", "ops", "text", "trace"},
    {"scheduling", "layers", "prompts", "output", "beam_search", "scoring", "trace_reader", "trace_frame"},
    {"scheduler", "trace_view"},
    {"models"},
    {"runner"},
    {"engine"},
    {"jobs"},
    {"llm"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = {
    "errors",
    "options",
    "sampling_params",
    "config",
    "hub",
    "request",
    "batch",
    "lazy_heap",
    "cache",
    "scheduling",
    "scheduler",
    "text",
    "prompts",
    "output",
    "beam_search",
    "scoring",
    "trace",
    "trace_frame",
    "trace_reader",
    "trace_view",
}

# Where an import may stand inside a function, and why.
LATE_IMPORTS = {
    "minivllm.ops._build": "the JIT builder pulls in setuptools and is needed only when there is something to build",
    "huggingface_hub": "the hub's client is slow to import and most runs use a local folder",
    "huggingface_hub.errors": "the same",
}


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}"
            yield node.module or "", node


def typing_only(tree: ast.AST) -> set[ast.stmt]:
    blocks = (node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {inner for block in blocks for inner in ast.walk(block) if isinstance(inner, ast.stmt)}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_go_down_only(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    room, skipped = room_of(module_of(file)), typing_only(tree)
    for name, node in imports(tree):
        if node in skipped or not room or room == "__main__":
            continue
        if room in TORCH_FREE:
            assert name.partition(".")[0] != "torch", f"{room} is free of torch, line {node.lineno}"
        if name == "minivllm":
            assert room == "cli", f"only the command line uses the public package, line {node.lineno}"
        elif name.startswith("minivllm."):
            target = room_of(name)
            if room == "ops":
                assert target == "ops", f"ops stands alone, line {node.lineno}"
            assert target == room or FLOOR_OF[target] < FLOOR_OF[room], f"{room} imports {target}, line {node.lineno}"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_no_globals_and_no_late_imports(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]
    if room_of(module_of(file)) == "cli":
        return
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    late = {(name, alias.name) for f in functions for name, node in imports(f) for alias in node.names}
    for name, alias in late:
        assert name in LATE_IMPORTS or f"{name}.{alias}" in LATE_IMPORTS, f"{name} is imported inside a function"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_sizes_and_docstrings(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file opens with what it decides or computes"
    assert len(text.splitlines()) <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= 60, f"{node.name} has {length} lines"


def test_native_sources_stay_small() -> None:
    for file in (PACKAGE / "csrc").rglob("*.*"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 700, file


def test_one_op_one_name() -> None:
    names = [file.stem for file in (PACKAGE / "ops").glob("*.py") if not file.stem.startswith("_")]
    assert names
    for name in names:
        for place in (
            PACKAGE / "csrc" / f"{name}.cpp",
            ROOT / f"tests/ops/test_{name}.py",
            ROOT / f"bench/ops/bench_{name}.py",
        ):
            assert place.is_file(), f"op file {name} has no {place.relative_to(ROOT)}"
    for kernel in (PACKAGE / "csrc").glob("*.cu"):
        owned = any(kernel.stem == name or kernel.stem.startswith(f"{name}_") for name in names)
        assert owned, f"{kernel.name} belongs to no op file"  # sample_filter.cu is part of sample
        assert "torch/" not in kernel.read_text(encoding="utf-8"), f"{kernel.name} must be torch-free"


def test_tests_mirror_the_package() -> None:
    """tests/a/test_b.py, or test_b_aspect.py, tests minivllm/a/b.py, _b.py or the package b."""
    for test in (ROOT / "tests").rglob("test_*.py"):
        of_the_whole = test.name in ("test_house.py", "test_public_names.py", "test_every_op.py")
        if of_the_whole or test.parent.name in ("bench", "examples"):
            continue
        folder = PACKAGE / test.parent.relative_to(ROOT / "tests")
        words = test.stem.split("_")[1:]
        names = ["_".join(words[:count]) for count in range(1, len(words) + 1)]
        candidates = [folder / form for name in names for form in (f"{name}.py", f"_{name}.py", name)]
        assert any(candidate.exists() for candidate in candidates), f"{test} mirrors nothing"


@pytest.mark.parametrize("package", ["minivllm", "minivllm.ops"])
def test_public_names_are_what_the_readme_documents(package: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = importlib.import_module(package).__all__
    assert sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name)) == list(names)
    for name in names:
        assert f"`{name}" in readme, f"{package}.{name} is not in the README"
        assert hasattr(importlib.import_module(package), name)
