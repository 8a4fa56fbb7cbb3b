"""ModelConfig from good, odd and broken folders; EngineConfig's table of refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from minivllm.config import EngineConfig, ModelConfig
from minivllm.errors import ConfigError

GOOD: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
DROP = object()


def folder(path: Path, changes: dict[str, Any] | None = None, generation: object = None) -> Path:
    data = {key: value for key, value in {**GOOD, **(changes or {})}.items() if value is not DROP}
    (path / "config.json").write_text(json.dumps(data))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_every_field_is_read(tmp_path: Path) -> None:
    assert dataclasses.asdict(ModelConfig.from_hf(folder(tmp_path))) == {
        "architecture": "LlamaForCausalLM",
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "eos_token_ids": (2,),
        "bos_token_id": 1,
    }


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 9e5}
SPELLINGS = [
    ({"head_dim": DROP}, "head_dim", 8),
    ({"head_dim": None}, "head_dim", 8),
    ({"num_key_value_heads": DROP}, "num_key_value_heads", 8),
    ({"rope_theta": DROP}, "rope_theta", 10000.0),
    ({"rope_theta": DROP, "rope_parameters": DEFAULT_ROPE}, "rope_theta", 9e5),
    ({"rope_theta": 9e5, "rope_parameters": DEFAULT_ROPE}, "rope_theta", 9e5),
    ({"rope_scaling": {"type": "default"}}, "rope_theta", 50000.0),
    ({"rope_scaling": None}, "rope_theta", 50000.0),
    ({"torch_dtype": DROP}, "dtype", "float32"),
    ({"torch_dtype": DROP, "dtype": "float16"}, "dtype", "float16"),
    ({"dtype": "bfloat16"}, "dtype", "bfloat16"),
    ({"tie_word_embeddings": DROP}, "tie_word_embeddings", False),
    ({"hidden_act": DROP}, "hidden_act", "silu"),
    ({"bos_token_id": None}, "bos_token_id", None),
    ({"eos_token_id": DROP}, "eos_token_ids", ()),
    ({"eos_token_id": [5, 6, 5]}, "eos_token_ids", (5, 6)),
    ({"sliding_window": 4096, "use_sliding_window": False}, "hidden_size", 64),
    ({"layer_types": ["full_attention"] * 5}, "hidden_size", 64),
    ({"auto_map": {"AutoModel": "evil.Model"}}, "architecture", "LlamaForCausalLM"),
]


@pytest.mark.parametrize(("changes", "field", "expected"), SPELLINGS)
def test_spellings_and_defaults(tmp_path: Path, changes: dict[str, Any], field: str, expected: object) -> None:
    assert getattr(ModelConfig.from_hf(folder(tmp_path, changes)), field) == expected


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": [7, 8]}, (7, 8)), ({"eos_token_id": 7}, (7,)), ({}, (2,)), ({"eos_token_id": None}, (2,))],
)
def test_end_tokens_come_from_the_generation_config_first(
    tmp_path: Path, generation: object, expected: tuple[int, ...]
) -> None:
    assert ModelConfig.from_hf(str(folder(tmp_path, generation=generation))).eos_token_ids == expected


REQUIRED = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
REQUIRED += ["max_position_embeddings", "rms_norm_eps"]
SIZES = [*REQUIRED[:-1], "num_key_value_heads", "head_dim"]
BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    *[({key: DROP}, f"{key} is missing") for key in REQUIRED],
    *[({key: None}, f"{key} is missing") for key in REQUIRED],
    *[({key: bad}, f"{key} is ") for key in SIZES for bad in (0, -8, 8.0, "8", True, [8], math.nan, 10**12)],
    *[
        ({key: bad, "head_dim": DROP}, f"{key} is ")
        for key in ("hidden_size", "num_attention_heads")
        for bad in (0, "8")
    ],
    *[({"rms_norm_eps": bad}, "rms_norm_eps is ") for bad in (0, -1e-5, math.nan, math.inf, 2, "1e-5", True)],
    *[({"rope_theta": bad}, "rope_theta is ") for bad in (0, -1, math.nan, math.inf, 1e30, "10000", True)],
    *[({"architectures": bad}, "architectures is ") for bad in (None, [], "LlamaForCausalLM", {})],
    *[({"architectures": bad}, "architecture is ") for bad in ([None], [""], [3])],
    *[({"torch_dtype": bad}, "dtype is ") for bad in ("float64", "int8", 16, ["float32"])],
    *[({"tie_word_embeddings": bad}, "tie_word_embeddings is ") for bad in (1, "true")],
    *[({"bos_token_id": bad}, "bos_token_id is ") for bad in (-1, 512, 1.0, True, "1", [1])],
    *[({"eos_token_id": bad}, "eos_token_id[0] is ") for bad in (-1, 512, 1.0, True, "1", [512], {})],
    *[({"rope_scaling": bad}, "rope_scaling is ") for bad in ("linear", 2, ["default"])],
    ({"num_key_value_heads": 3}, "the first must be a multiple of the second"),
    ({"head_dim": 7}, "head_dim is 7; it must be even"),
    ({"hidden_size": 68, "head_dim": DROP}, "give head_dim, or make it divide"),
    ({"dtype": "float16"}, "dtype is given twice, as 'float16' and 'bfloat16'"),
    ({"rope_parameters": DEFAULT_ROPE}, "rope_theta is given twice, as 50000 and 900000.0"),
]
NOT_YET: list[tuple[dict[str, Any], str]] = [
    ({"attention_bias": True}, "attention_bias is true"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"use_sliding_window": True}, "sliding_window"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 50000}}, "rope_type is 'yarn'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters.full_attention"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is "),
]


@pytest.mark.parametrize(("changes", "message"), BAD_VALUES + NOT_YET)
def test_bad_values_name_file_and_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = folder(tmp_path, changes) / "config.json"
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: .*{re.escape(message)}"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(("changes", "message"), NOT_YET)
def test_what_is_not_supported_says_so(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match="support"):
        ModelConfig.from_hf(folder(tmp_path, changes))


@pytest.mark.parametrize("bad", [[512], -1, "2", [True]])
def test_a_bad_generation_config_is_named(tmp_path: Path, bad: object) -> None:
    file = folder(tmp_path, generation={"eos_token_id": bad}) / "generation_config.json"
    with pytest.raises(ConfigError, match=f"^{re.escape(str(file))}: eos_token_id"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"null", b"[" * 100_000, b'{"a": ' + b"9" * 5000])
def test_broken_json_is_a_config_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "config.json"))):
        ModelConfig.from_hf(tmp_path)
    folder(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "generation_config.json"))):
        ModelConfig.from_hf(tmp_path)


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model folder"):
        ModelConfig.from_hf(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        ModelConfig.from_hf(tmp_path)


def test_real_folders(data_dir: Path) -> None:
    config = ModelConfig.from_hf(data_dir / "tokenizers" / "qwen3")
    assert config.architecture == "Qwen3ForCausalLM"
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert (config.rope_theta, config.dtype, config.eos_token_ids) == (1e6, "bfloat16", (151645, 151643))


def model_config(**changes: Any) -> ModelConfig:
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    shape = {key: value for key, value in GOOD.items() if key in names}
    return ModelConfig(**{"architecture": "LlamaForCausalLM", **shape, **changes})


def test_model_config_checks_itself_without_a_file() -> None:
    assert model_config(eos_token_ids=[3, 3]).eos_token_ids == (3,)
    for changes in ({"hidden_size": 0}, {"eos_token_ids": 5}, {"eos_token_ids": [512]}, {"dtype": "auto"}):
        with pytest.raises(ConfigError, match=re.escape(next(iter(changes))[:9])):
            model_config(**changes)
    with pytest.raises(ConfigError, match="did you mean 'hidden_size'"):
        model_config(hiden_size=4)


BAD_ENGINE = [
    ("model", [3, "", b"folder", ["m"]]),
    ("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1 ", "cpu\n", 0, None]),
    ("dtype", ["float", "half", "float64", None, 32]),
    ("max_model_len", [1, 0, -5, 1.0, True, "512", 2**40]),
    ("max_num_seqs", [0, -1, 2.0, True, None, "8", 2**20]),
    ("max_num_batched_tokens", [0, -1, 64.0, False, None, 255, 2**30]),
    ("block_size", [0, 4, 7, 12, 24, 512, 16.0, True, None, -16]),
    ("num_kv_blocks", [0, -1, 10.0, True, "10", 2**31]),
    ("gpu_memory_utilization", [0, -0.1, 1.01, math.nan, math.inf, True, "0.9", None]),
    ("enable_prefix_caching", [1, None, "yes"]),
    ("enforce_eager", [True, 0, None]),
    ("tensor_parallel_size", [2, 0, True, 1.0, None]),
    ("scheduling_policy", ["lifo", None, 1, ""]),
    ("prefix_aware_scheduling", [1, None, "yes"]),
    ("max_num_waiting", [0, -1, 2.0, True, None, 2**25]),
    ("trace", ["", 5, b"file", True]),
    ("load_format", ["pickle", None, 1]),
    ("seed", [None, 1.0, True, 2**63, "0"]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_ENGINE for value in values])
def test_engine_config_refuses(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}"):
        EngineConfig(**{name: value})


def test_engine_config_accepts_its_limits() -> None:
    for changes in (
        {"device": "cuda:7", "dtype": "float16", "load_format": "dummy", "block_size": 256, "num_kv_blocks": 1},
        {"device": "cpu", "max_model_len": 2, "gpu_memory_utilization": 1, "block_size": 8, "seed": -(2**63)},
        {"max_num_seqs": 1, "max_num_batched_tokens": 1, "enable_prefix_caching": False, "tensor_parallel_size": 1},
        {"scheduling_policy": "priority", "prefix_aware_scheduling": False, "max_num_waiting": 1, "trace": "run.json"},
    ):
        config = EngineConfig(**changes)
        assert {key: getattr(config, key) for key in changes} == changes
    assert EngineConfig(model=Path("here")).model == "here"


def test_later_features_and_unknown_options_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size comes in a later version; leave it at 1"):
        EngineConfig(tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="no option 'max_seqs'; did you mean 'max_num_seqs'"):
        EngineConfig(max_seqs=4)
    with pytest.raises(ConfigError, match="less than max_num_seqs = 256"):
        EngineConfig(max_num_batched_tokens=128)


def test_max_model_len_is_bounded_by_the_model() -> None:
    model = model_config()
    assert EngineConfig().resolve_max_model_len(model) == 256
    assert EngineConfig(max_model_len=100).resolve_max_model_len(model) == 100
    assert EngineConfig(max_model_len=256).resolve_max_model_len(model) == 256
    with pytest.raises(ConfigError, match="max_model_len is 257, but the model was made for 256"):
        EngineConfig(max_model_len=257).resolve_max_model_len(model)
