"""What is timed: one `Case` for each op, way, device, dtype and shape, and the shapes of the models they come from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
from peers import flashinfer
from torch import Tensor

from minivllm import ops

HAS_CUDA = torch.cuda.is_available()
FLOATS = (torch.float32, torch.bfloat16)
VOCAB = 151_936  # of Qwen3
BLOCK_SIZE = 16

Size = int | str


@dataclass(frozen=True)
class Model:
    """The shapes that ops see in one layer of a model."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


TINY = Model(256, 768, 4, 2, 64)
SMALL = Model(1024, 3072, 16, 8, 128)  # Qwen3-0.6B
LARGE = Model(4096, 12288, 32, 8, 128)  # Qwen3-8B
CPU_MODELS = (TINY, SMALL)
# (model, tokens of a large batch): the larger batch of the smaller model, so that both move about as much
GPU_BATCHES = ((SMALL, 64), (SMALL, 16_384), (LARGE, 64), (LARGE, 8_192))


@dataclass(frozen=True)
class Case:
    """One op at one shape, done one way ("minivllm", "torch" or a peer)."""

    op: str
    way: str
    device: str
    dtype: torch.dtype
    names: tuple[str, ...]
    sizes: tuple[Size, ...]

    @property
    def shape(self) -> str:
        return ", ".join(f"{name} {size}" for name, size in zip(self.names, self.sizes, strict=True))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def group(self) -> str:
        return f"{self.op} {self.device} {self.dtype_name} {self.shape}"

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def ints(self, values: Iterable[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(list(values), device=self.device, dtype=dtype)


def cases(
    op: str,
    ways: str,
    names: str,
    *,
    cpu: Sequence[tuple[Size, ...]] = (),
    cuda: Sequence[tuple[Size, ...]] = (),
    cpu_dtypes: Sequence[torch.dtype] = FLOATS,
    cuda_dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
) -> pytest.MarkDecorator:
    """Parametrises a benchmark with `case`: every way at every shape. Ways and names of the sizes are words; a way that
    begins with "flashinfer" runs on a GPU where FlashInfer is installed."""
    parameters = []
    for device, dtypes, shapes in (("cpu", cpu_dtypes, cpu), ("cuda", cuda_dtypes, cuda if HAS_CUDA else ())):
        for dtype in dtypes:
            for sizes in shapes:
                for way in ways.split():
                    if way.startswith("flashinfer") and device == "cpu":
                        continue
                    case = Case(op, way, device, dtype, tuple(names.split()), tuple(sizes))
                    name = "-".join((device, case.dtype_name, "x".join(str(size) for size in sizes), way))
                    parameters.append(pytest.param(case, id=name, marks=_skips(case)))
    return pytest.mark.parametrize("case", parameters)


def _skips(case: Case) -> list[pytest.MarkDecorator]:
    why = ""
    if case.way.startswith("flashinfer"):
        why = "" if flashinfer else "FlashInfer is not installed"
    elif case.way.startswith("minivllm"):
        served = ops.served_by().get(case.op, {}).get(case.device.upper(), "nothing")
        # On a CPU the reference is worth timing; on a GPU at these shapes it would take minutes.
        if served == "nothing" or (served == "reference" and case.device == "cuda"):
            why = f"{case.op} is served by {served} on {case.device}"
    return [pytest.mark.skip(reason=why)] if why else []
