"""minivllm: an LLM inference engine small enough to read in an afternoon.

    from minivllm import LLM, SamplingParams
    with LLM() as llm:
        print(llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].text)

`import minivllm` imports nothing heavy: each public name is imported when it is first used. The kernels alone are in
`minivllm.ops`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minivllm.beam_search import Beam, BeamSearchOutput
    from minivllm.config import EngineConfig
    from minivllm.engine import LLMEngine
    from minivllm.errors import (
        ChatTemplateError,
        ConfigError,
        EngineDeadError,
        MiniVLLMError,
        QueueFullError,
        RequestError,
        TokenizerError,
        WeightError,
    )
    from minivllm.jobs import Delta
    from minivllm.llm import LLM
    from minivllm.request import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
    from minivllm.sampling_params import SamplingParams
    from minivllm.scoring import Embedding, Score
    from minivllm.text.tokenizer import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "minivllm.beam_search": ("Beam", "BeamSearchOutput"),
    "minivllm.config": ("EngineConfig",),
    "minivllm.engine": ("LLMEngine",),
    "minivllm.errors": (
        "ChatTemplateError",
        "ConfigError",
        "EngineDeadError",
        "MiniVLLMError",
        "QueueFullError",
        "RequestError",
        "TokenizerError",
        "WeightError",
    ),
    "minivllm.jobs": ("Delta",),
    "minivllm.llm": ("LLM",),
    "minivllm.request": ("CompletionOutput", "FinishReason", "Logprob", "RequestMetrics", "RequestOutput"),
    "minivllm.sampling_params": ("SamplingParams",),
    "minivllm.scoring": ("Embedding", "Score"),
    "minivllm.text.tokenizer": ("Tokenizer",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "Beam",
    "BeamSearchOutput",
    "ChatTemplateError",
    "CompletionOutput",
    "ConfigError",
    "Delta",
    "Embedding",
    "EngineConfig",
    "EngineDeadError",
    "FinishReason",
    "LLMEngine",
    "Logprob",
    "MiniVLLMError",
    "QueueFullError",
    "RequestError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "Tokenizer",
    "TokenizerError",
    "WeightError",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'minivllm' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
