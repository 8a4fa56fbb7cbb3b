"""Fixtures shared by all tests: where other people's data lies, and a fresh random seed that is printed on failure."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data made by others (tokenizers, models, workloads); it never lies inside the repository."""
    folder = Path(os.environ.get("MINIVLLM_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set MINIVLLM_DATA")
    return folder


@pytest.fixture
def seed() -> int:
    """A new seed each run; MINIVLLM_TEST_SEED repeats one. pytest shows the print when the test fails."""
    value = int(os.environ.get("MINIVLLM_TEST_SEED", random.randrange(2**31)))
    print(f"MINIVLLM_TEST_SEED={value}")
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests skip without a GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
