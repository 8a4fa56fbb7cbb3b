"""Argument checks of the PyTorch references and fake kernels: shapes written as words, as in the docstrings.

A word such as `num_tokens` is bound by the first tensor that has it and must match in every later one; a number must
match itself; `...` takes any leading dimensions. `csrc/common/check.h` says the same things for the compiled kernels.
"""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int32, torch.int64)


class Check:
    """Checks the arguments of one call of `op`; every failure is a RuntimeError that names argument, wanted and got."""

    def __init__(self, op: str, device: torch.device) -> None:
        self.op = op
        self.device = device
        self.sizes: dict[str, int] = {}

    def fail(self, text: str) -> None:
        raise RuntimeError(f"minivllm::{self.op}: {text}")

    def tensor(self, name: str, tensor: torch.Tensor, shape: str, dtypes: tuple[torch.dtype, ...]) -> None:
        """Device, dtype, shape and a contiguous last dimension of one tensor."""
        if tensor.device != self.device:
            self.fail(f"{name} is on {tensor.device}, expected {self.device}")
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            self.fail(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected {wanted}")
        words = shape.split()
        got = list(tensor.shape)
        if words and words[0] == "...":
            words = words[1:]
            got = got[len(got) - len(words) :] if len(got) >= len(words) else got
        matches = len(words) == len(got) and all(self._bind(word, size) for word, size in zip(words, got, strict=True))
        if not matches:
            known = ", ".join(f"{word}={size}" for word, size in self.sizes.items())
            self.fail(f"{name} has shape {list(tensor.shape)}, expected [{shape.replace(' ', ', ')}] with {known}")
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            self.fail(f"{name} must be contiguous in its last dimension; call .contiguous() first")

    def _bind(self, word: str, size: int) -> bool:
        if word.isdigit():
            return size == int(word)
        return self.sizes.setdefault(word, size) == size


def check_ids(check: Check, name: str, ids: torch.Tensor, size: int, *, lowest: int | None = 0) -> None:
    """Each of ids: [n] int64 lies in [lowest, size), without a lower bound for None.

    On the CPU alone: to look at ids that lie on a GPU would stall it.
    """
    if ids.device.type != "cpu" or not ids.numel():
        return
    smallest, largest = int(ids.min()), int(ids.max())
    if largest >= size:
        check.fail(f"{name} holds {largest}, expected less than {size}")
    if lowest is not None and smallest < lowest:
        check.fail(f"{name} holds {smallest}, expected at least {lowest}")
