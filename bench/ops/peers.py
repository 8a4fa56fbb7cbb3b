"""FlashInfer, where its wheel is installed (`pip install flashinfer-python`): the peer of most kernels on a GPU.

It compiles its kernels at the first use, half a minute for each family of them; compile_peers.py does it beforehand.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor


def _import() -> Any:
    if not torch.cuda.is_available() or importlib.util.find_spec("flashinfer") is None:
        return None
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}" + ("a" if major >= 9 else ""))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module("flashinfer")
        except ImportError as error:
            print(f"FlashInfer is installed but cannot be imported: {error}")
            return None


flashinfer: Any = _import()


@cache
def workspace() -> Tensor:
    """Shared by all of FlashInfer's attention wrappers: they run one after the other."""
    return torch.zeros(512 << 20, dtype=torch.uint8, device="cuda")
