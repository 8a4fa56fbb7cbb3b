"""Streams a checkpoint's safetensors into a model's parameters, and says exactly what is missing or unexpected.

A checkpoint tensor is copied straight into its parameter, or into its rows of a fused one; nothing is held twice.
Weights come from safetensors only: nothing in a model folder is executed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minivllm.errors import WeightError
from minivllm.layers.embedding import Embedding
from minivllm.layers.linear import FusedLinear, Linear
from minivllm.models.base import CausalLM

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load(model: CausalLM, folder: Path) -> None:
    """Fill every parameter of `model` from the safetensors in `folder`, converting dtypes.

    Raises:
        WeightError: no safetensors, a damaged file or index, a tensor of the wrong shape, missing or unexpected names.
    """
    parameters = dict(model.named_parameters())
    targets = _targets(model, parameters)
    filled: set[str] = set()
    unexpected: list[str] = []
    for file in weight_files(folder):
        for name, tensor in _tensors(file):
            if name in targets:
                _copy(name, tensor, targets[name], file)
                filled.add(name)
            elif not name.endswith(model.unused_weights):
                unexpected.append(name)
    missing = sorted(targets.keys() - filled)
    if missing or unexpected:
        raise WeightError(
            f"the checkpoint in {folder} does not fit the model: {_names('missing', missing)}, "
            f"{_names('unexpected', sorted(unexpected))}. Check that config.json and the weights belong together"
        )


def fill_random(model: CausalLM, seed: int) -> None:
    """`load_format="dummy"`: small random weights of a model's real shapes, for speed measurements without a
    checkpoint."""
    for parameter in model.parameters():
        generator = torch.Generator(parameter.device).manual_seed(seed)
        parameter.data.normal_(0.0, 0.02, generator=generator)
        if parameter.dim() == 1:
            parameter.data.add_(1.0)
        seed += 1


def pack(model: CausalLM) -> None:
    """Let every layer bring its loaded weights into the form that it computes with fastest."""
    for module in model.modules():
        if isinstance(module, Linear | Embedding):
            module.pack()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder: those that the index names, else the single file."""
    index = folder / INDEX_FILE
    if index.is_file():
        return [folder / name for name in _indexed_names(index)]
    single = folder / SINGLE_FILE
    if not single.is_file():
        raise WeightError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; minivllm reads safetensors only")
    return [single]


def _indexed_names(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightError(f"{index} is not a safetensors index (no object `weight_map`): {error}") from error
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise WeightError(f"{index} names {name!r}; expected names of .safetensors files in the same folder")
        if not (index.parent / name).is_file():
            raise WeightError(f"{index} names {name!r}, which is not in the folder; download the checkpoint again")
    return names


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (the handle is not a dict)
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{file} is not a whole safetensors file: {error}. Download it again") from error


def _targets(model: CausalLM, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoint name -> the parameter, or the rows of a fused parameter, that it fills."""
    targets: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        stem, _, last = owner.rpartition(".")
        if last not in model.fused_weights:
            targets[name] = parameter.data
            continue
        module = model.get_submodule(owner)
        assert isinstance(module, FusedLinear)
        rows = parameter.data.split(module.splits)
        for part, slice_ in zip(model.fused_weights[last], rows, strict=True):
            targets[f"{stem}.{part}.{leaf}"] = slice_
    return targets


def _copy(name: str, tensor: Tensor, target: Tensor, file: Path) -> None:
    if tensor.shape != target.shape:
        raise WeightError(
            f"{name} in {file} has shape {list(tensor.shape)}, but config.json asks for {list(target.shape)}. "
            "Check that config.json and the weights belong together"
        )
    if not tensor.dtype.is_floating_point:
        raise WeightError(f"{name} in {file} has dtype {tensor.dtype}; quantised weights are not supported yet")
    target.copy_(tensor)


def _names(kind: str, names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {kind}" + (f" ({shown})" if names else "")
