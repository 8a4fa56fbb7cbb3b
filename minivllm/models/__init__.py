"""Model families: a table from the architecture's name in config.json to the class that computes it.

A class is named as "module:Class" and imported when it is needed. Its constructor is `(config, max_position, *, dtype,
device)`; it has `forward(fwd, kv) -> hidden states`, `logits(hidden)`, and the table `fused_weights` that
`weights.load` reads.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

import torch

from minivllm.config import ModelConfig
from minivllm.errors import ConfigError

if TYPE_CHECKING:
    from minivllm.models.base import CausalLM

ARCHITECTURES = {
    "Qwen3ForCausalLM": "minivllm.models.qwen3:Qwen3ForCausalLM",
}


def build_model(config: ModelConfig, max_position: int, *, dtype: torch.dtype, device: torch.device) -> CausalLM:
    """The model of `config.architecture`, with uninitialised parameters, for positions below `max_position`.

    Raises:
        ConfigError: the architecture is not in the table.
    """
    target = ARCHITECTURES.get(config.architecture)
    if target is None:
        near = difflib.get_close_matches(config.architecture, ARCHITECTURES, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        known = ", ".join(sorted(ARCHITECTURES))
        raise ConfigError(f"architecture {config.architecture!r} is not supported{hint} Supported: {known}")
    module, _, name = target.partition(":")
    model: CausalLM = getattr(importlib.import_module(module), name)(config, max_position, dtype=dtype, device=device)
    return model
