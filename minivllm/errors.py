"""The exceptions of minivllm, one small tree.

    MiniVLLMError                 anything a caller can cause; its text names the value, the limit and the fix
    |-- ConfigError               an engine or model option, or a model folder's config, cannot be used
    |-- RequestError              one request is wrong (HTTP 400); the engine goes on
    |   `-- ChatTemplateError     messages cannot be rendered with the model's chat template
    |-- QueueFullError            too many requests wait already (HTTP 429); try again later
    |-- WeightError               a checkpoint's tensors do not fit the model
    |-- TokenizerError            a tokenizer folder cannot be read
    `-- EngineDeadError           the engine has stopped; nothing more will be answered

`BuildError` (a failed compilation of the kernels) lives in `minivllm.ops`, which stands alone.
"""

from __future__ import annotations


class MiniVLLMError(Exception):
    """Base of every error that minivllm raises on purpose."""


class ConfigError(MiniVLLMError):
    """An engine or model option, or a model folder's config, cannot be used."""


class RequestError(MiniVLLMError):
    """One request is wrong; the engine and all other requests go on."""


class ChatTemplateError(RequestError):
    """Messages cannot be rendered with the model's chat template."""


class QueueFullError(MiniVLLMError):
    """Too many requests wait already; the request is right and may be sent again later."""


class WeightError(MiniVLLMError):
    """A checkpoint's tensors do not fit the model."""


class TokenizerError(MiniVLLMError):
    """A tokenizer folder cannot be read."""


class EngineDeadError(MiniVLLMError):
    """The engine has stopped; nothing more will be answered."""
