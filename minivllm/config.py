"""What the model is (`ModelConfig`, read from its folder) and how the engine shall run it (`EngineConfig`).

Both are frozen and checked once, at construction: whoever holds one may trust every value in it. A value that this
version cannot honour is an error, never ignored: a model computed in another way answers wrongly without a sign.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from minivllm.errors import ConfigError
from minivllm.options import check_bool, check_choice, check_float, check_int, show, strict_keywords

DTYPES = ("float32", "bfloat16", "float16")
POLICIES = ("fcfs", "priority")
"""Orders of urgency of requests: by arrival, or by priority (lower first) and then by arrival."""

# Upper limits far above any model in use and far below what could overflow an int32 index or the host's memory.
_INT_LIMITS = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 10,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 27,
}


@strict_keywords(ConfigError)
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one model, under the names of Hugging Face's config.json.

    Sizes are counts (`intermediate_size`: width of the SwiGLU layer; `head_dim`: width of one attention head, even).
    The defaults are those of the Hugging Face classes for keys that older folders leave out. Raises ConfigError.
    """

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    hidden_act: str = "silu"
    dtype: str = "float32"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or not self.architecture:
            raise ConfigError(f"architecture is {show(self.architecture)}; it must be a class name as in architectures")
        for name, high in _INT_LIMITS.items():
            _set(self, name, check_int(name, getattr(self, name), 1, high, ConfigError))
        _set(self, "rms_norm_eps", check_float("rms_norm_eps", self.rms_norm_eps, 0, 1, ConfigError, low_excluded=True))
        _set(self, "rope_theta", check_float("rope_theta", self.rope_theta, 1.0, 1e15, ConfigError))
        check_bool("tie_word_embeddings", self.tie_word_embeddings, ConfigError)
        if check_bool("attention_bias", self.attention_bias, ConfigError):
            raise ConfigError("attention_bias is true, which is not supported yet; use a model without it")
        if self.hidden_act != "silu":
            raise ConfigError(f"hidden_act is {show(self.hidden_act)}, which is not supported yet; it must be 'silu'")
        check_choice("dtype", self.dtype, DTYPES, ConfigError)
        self._check_heads()
        self._check_token_ids()

    def _check_heads(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads is {self.num_attention_heads} and num_key_value_heads is "
                f"{self.num_key_value_heads}; the first must be a multiple of the second"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; it must be even, as rotary embedding turns pairs")

    def _check_token_ids(self) -> None:
        last = self.vocab_size - 1
        if not isinstance(self.eos_token_ids, tuple | list):
            raise ConfigError(f"eos_token_ids is {show(self.eos_token_ids)}; it must be a tuple of token ids")
        ids = (check_int(f"eos_token_id[{i}]", t, 0, last, ConfigError) for i, t in enumerate(self.eos_token_ids))
        _set(self, "eos_token_ids", tuple(dict.fromkeys(ids)))
        if self.bos_token_id is not None:
            _set(self, "bos_token_id", check_int("bos_token_id", self.bos_token_id, 0, last, ConfigError))

    @classmethod
    def from_hf(cls, folder: str | Path) -> ModelConfig:
        """Read `folder`/config.json, and the end tokens from generation_config.json where that has them.

        Nothing in the folder is executed. Raises ConfigError, naming the file, the key, its value and the fix.
        """
        root = Path(folder)
        if not root.is_dir():
            raise ConfigError(f"there is no model folder {root}; give a folder with config.json and *.safetensors")
        file = root / "config.json"
        data = _read_json(file)
        with _blaming(file):
            _refuse_unsupported(data)
            config = cls(**_fields_from_hf(data))
        generation = root / "generation_config.json"
        if generation.is_file():
            eos = _read_json(generation).get("eos_token_id")
            if eos is not None:
                with _blaming(generation):
                    return replace(config, eos_token_ids=_as_list(eos))
        with _blaming(file):
            return replace(config, eos_token_ids=_as_list(data.get("eos_token_id")))


def _set(config: object, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)


@contextmanager
def _blaming(file: Path) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); a model folder needs it") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not valid JSON ({error}); download it again") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} holds {show(data)}; it must be a JSON object")
    return data


def _as_list(ids: Any) -> tuple[Any, ...]:
    """The spellings of eos_token_id (absent, one id, a list) as one."""
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


def _fields_from_hf(data: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of ModelConfig but for the end tokens; an absent or null key takes the default."""
    given = {f.name: data[f.name] for f in fields(ModelConfig) if data.get(f.name) is not None}
    given["architecture"] = _architecture(data.get("architectures"))
    given["rope_theta"] = _only_value("rope_theta", [given.get("rope_theta"), *_in_rope_sections(data, "rope_theta")])
    given["dtype"] = _only_value("dtype", [data.get("dtype"), data.get("torch_dtype")])
    given.setdefault("num_key_value_heads", given.get("num_attention_heads"))
    if "head_dim" not in given:
        given["head_dim"] = _derived_head_dim(given.get("hidden_size"), given.get("num_attention_heads"))
    given = {name: value for name, value in given.items() if value is not None and name != "eos_token_ids"}
    for field in fields(ModelConfig):
        if field.default is MISSING and field.name not in given:
            raise ConfigError(f"{field.name} is missing or null; a model's config must give it")
    return given


def _architecture(names: Any) -> Any:
    if not isinstance(names, list) or not names:
        raise ConfigError(f"architectures is {show(names)}; it must be a list with the name of the model's class")
    return names[0]


def _derived_head_dim(hidden_size: Any, num_heads: Any) -> int | None:
    """hidden_size / num_attention_heads; None where one of them is missing, which is reported as such."""
    if hidden_size is None or num_heads is None:
        return None
    width = check_int("hidden_size", hidden_size, 1, _INT_LIMITS["hidden_size"], ConfigError)
    heads = check_int("num_attention_heads", num_heads, 1, _INT_LIMITS["num_attention_heads"], ConfigError)
    if width % heads:
        raise ConfigError(f"hidden_size is {width} and num_attention_heads {heads}; give head_dim, or make it divide")
    return width // heads


def _only_value(name: str, values: list[Any]) -> Any:
    """The one value that two spellings of a key agree on, None where neither is given."""
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given[1:]):
        raise ConfigError(f"{name} is given twice, as {' and '.join(map(show, given))}; keep one of them")
    return given[0] if given else None


def _in_rope_sections(data: dict[str, Any], key: str) -> list[Any]:
    """`key` as it stands in rope_parameters (transformers 5) and in rope_scaling (before)."""
    return [data[name].get(key) for name in ("rope_parameters", "rope_scaling") if data.get(name) is not None]


def _refuse_unsupported(data: dict[str, Any]) -> None:
    """Raise for every known key that changes the computation in a way that this version does not follow."""
    for name in ("rope_parameters", "rope_scaling"):
        section = data.get(name)
        if section is not None and not isinstance(section, dict):
            raise ConfigError(f"{name} is {show(section)}; it must be an object or null")
        for key, value in (section or {}).items():
            if isinstance(value, dict):
                raise ConfigError(f"{name}.{key} is {show(value)}: rotary embedding by layer is not supported yet")
    for kind in _in_rope_sections(data, "rope_type") + _in_rope_sections(data, "type"):
        if kind not in (None, "default"):
            raise ConfigError(f"rope_type is {show(kind)}, which is not supported yet; only 'default' is")
    for part in [data.get("partial_rotary_factor"), *_in_rope_sections(data, "partial_rotary_factor")]:
        if part not in (None, 1):
            raise ConfigError(f"partial_rotary_factor is {show(part)}, which is not supported yet; only 1 is")
    if _uses_sliding_window(data):
        raise ConfigError("use_sliding_window or sliding_window is set, which is not supported yet")
    for key in ("mlp_bias", "quantization_config"):
        if data.get(key):
            raise ConfigError(f"{key} is {show(data[key])}, which is not supported yet; use a model without it")


def _uses_sliding_window(data: dict[str, Any]) -> bool:
    """A window counts where it is switched on, and where it is given and no switch says otherwise."""
    layer_types = data.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(f"layer_types is {show(layer_types)}; only 'full_attention' is supported yet")
    switch = data.get("use_sliding_window")
    if switch is None:
        return data.get("sliding_window") is not None
    return check_bool("use_sliding_window", switch, ConfigError)


@strict_keywords(ConfigError)
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the engine runs a model; every value is checked at construction. Raises ConfigError.

    model: folder of the model; None takes the bundled one.
    device: "auto", "cpu", "cuda" or "cuda:N".
    dtype: of weights, activations and KV cache: "auto" (the model's own), "float32", "bfloat16" or "float16".
    max_model_len: longest prompt and answer together, in tokens; None takes the model's.
    max_num_seqs: most requests that run at once.
    max_num_batched_tokens: most query tokens of one step, at least max_num_seqs.
    block_size: tokens of one block of the KV cache, a power of two from 8 to 256.
    num_kv_blocks: size of the KV cache in blocks; None fits it to the memory.
    gpu_memory_utilization: share of a GPU's memory that the engine may use, in (0, 1]; a CPU has no such limit.
    load_format: "auto" reads the weights; "dummy" fills them with random numbers, for measurements.
    seed: what the draws of requests without a seed are derived from.
    enable_prefix_caching: keep computed prompts and answers in the KV cache for later requests that begin with them.
    scheduling_policy: "fcfs", or "priority": requests of lower priority first, of equal ones the first to come.
    prefix_aware_scheduling: a request whose prompt mostly equals one that is being computed waits for that one.
    max_num_waiting: most requests that wait at once; more are refused with QueueFullError.
    trace: file to which every step is written, for https://ui.perfetto.dev and `python -m minivllm trace`.
    enforce_eager, tensor_parallel_size: come in a later version; only the default is accepted.
    """

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    block_size: int = 16
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"
    prefix_aware_scheduling: bool = True
    max_num_waiting: int = 65536
    trace: str | None = None
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    load_format: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_model_and_device()
        self._check_int("max_num_seqs", 1, 1 << 16)
        self._check_int("max_num_batched_tokens", 1, 1 << 20)
        self._check_int("block_size", 8, 256)
        self._check_int("max_num_waiting", 1, 1 << 24)
        self._check_int("tensor_parallel_size", 1, 1 << 10)
        self._check_int("seed", -(2**63), 2**63 - 1)
        if self.max_model_len is not None:  # 2: one token of prompt, one generated
            self._check_int("max_model_len", 2, _INT_LIMITS["max_position_embeddings"])
        if self.num_kv_blocks is not None:
            self._check_int("num_kv_blocks", 1, 2**31 - 1)
        share = check_float("gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, ConfigError, low_excluded=True)
        _set(self, "gpu_memory_utilization", share)
        check_bool("enable_prefix_caching", self.enable_prefix_caching, ConfigError)
        check_choice("scheduling_policy", self.scheduling_policy, POLICIES, ConfigError)
        check_bool("prefix_aware_scheduling", self.prefix_aware_scheduling, ConfigError)
        check_bool("enforce_eager", self.enforce_eager, ConfigError)
        self._check_together()

    def _check_int(self, name: str, low: int, high: int) -> None:
        _set(self, name, check_int(name, getattr(self, name), low, high, ConfigError))

    def _check_model_and_device(self) -> None:
        model: Any = self.model
        if isinstance(model, os.PathLike):
            _set(self, "model", os.fspath(model))
        elif model is not None and (not isinstance(model, str) or not model):
            raise ConfigError(f"model is {show(model)}; it must be a folder, or None for the bundled model")
        trace: Any = self.trace
        if isinstance(trace, os.PathLike):
            _set(self, "trace", os.fspath(trace))
        elif trace is not None and (not isinstance(trace, str) or not trace):
            raise ConfigError(f"trace is {show(trace)}; it must be the path of a file to write, or None")
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise ConfigError(f"device is {show(self.device)}; it must be 'auto', 'cpu', 'cuda' or 'cuda:N'")
        check_choice("dtype", self.dtype, ("auto", *DTYPES), ConfigError)
        check_choice("load_format", self.load_format, ("auto", "dummy"), ConfigError)

    def _check_together(self) -> None:
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size is {self.block_size}; it must be a power of two from 8 to 256")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, less than max_num_seqs = "
                f"{self.max_num_seqs}; a step must hold one token of every running request: raise it or lower that"
            )
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("enforce_eager", "tensor_parallel_size"):
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"{name} comes in a later version; leave it at {defaults[name]}")

    def resolve_max_model_len(self, model: ModelConfig) -> int:
        """`max_model_len`, or the model's own limit where that is None; ConfigError if it exceeds the model's."""
        limit = model.max_position_embeddings
        if self.max_model_len is None:
            return limit
        if self.max_model_len > limit:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}, but the model was made for {limit} positions "
                f"(max_position_embeddings); lower it to at most {limit}"
            )
        return self.max_model_len
