"""`import minivllm` stays light: nothing heavy is imported and nothing is compiled until a name is used. `import
minivllm.ops` needs torch alone."""

from __future__ import annotations

import subprocess
import sys

import minivllm
from minivllm import ops


def test_import_is_light() -> None:
    heavy = ("torch", "numpy", "tiktoken", "rich", "jinja2", "minivllm.ops")
    code = f"import sys, minivllm; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_ops_import_torch_alone() -> None:
    assert ops.build_info()  # the kernels are compiled by now, so that the import below only loads them
    code = (
        "import sys, torch; before = set(sys.modules); import minivllm.ops; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['minivllm']"
    rooms = "print(sorted(name for name in sys.modules if name.startswith('minivllm.') and '.ops' not in name))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, minivllm.ops; {rooms}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]", "the rest of the engine stays out"


def test_every_public_name_resolves() -> None:
    for name in minivllm.__all__:
        assert getattr(minivllm, name).__name__ == name
    assert set(minivllm.__all__) <= set(dir(minivllm))


def test_unknown_names_raise() -> None:
    try:
        minivllm.Llm  # noqa: B018
    except AttributeError as error:
        assert "'Llm'" in str(error)
    else:
        raise AssertionError("an unknown name was found")
