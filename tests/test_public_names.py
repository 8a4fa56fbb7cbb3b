"""`import minivllm` stays light: nothing heavy is imported and nothing is compiled until a name is used."""

from __future__ import annotations

import subprocess
import sys

import minivllm


def test_import_is_light() -> None:
    heavy = ("torch", "numpy", "tiktoken", "rich", "jinja2", "minivllm.ops")
    code = f"import sys, minivllm; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
