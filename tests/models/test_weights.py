from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivllm.config import EngineConfig
from minivllm.engine import LLMEngine
from minivllm.errors import ConfigError, WeightError
from tests.small_models import exact_logits, make_checkpoint

WEIGHTS = "model.safetensors"


def load(folder: Path) -> LLMEngine:
    return LLMEngine(folder, EngineConfig(device="cpu", num_kv_blocks=16))


def test_sharded_checkpoint_equals_the_single_file(tmp_path: Path, seed: int) -> None:
    oracle = make_checkpoint(tmp_path, "gqa-tied", seed, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    torch.testing.assert_close(load(tmp_path).runner.prompt_logits(ids), exact_logits(oracle, ids), atol=1e-4, rtol=0)


def test_a_tied_head_in_the_checkpoint_is_not_needed(tmp_path: Path, seed: int) -> None:
    make_checkpoint(tmp_path, "gqa-tied", seed)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tmp_path / WEIGHTS)
    load(tmp_path)


def test_dummy_weights_need_no_checkpoint(tmp_path: Path, seed: int) -> None:
    make_checkpoint(tmp_path, "gqa-tied", seed)
    (tmp_path / WEIGHTS).unlink()
    engine = LLMEngine(tmp_path, EngineConfig(device="cpu", num_kv_blocks=16, load_format="dummy"))
    assert torch.isfinite(engine.runner.prompt_logits([1, 2, 3])).all()


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def lie_in_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((2**60).to_bytes(8, "little") + b"{}")


def index(weight_map: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(weight_map))

    return apply


LAYER = "model.layers.1.self_attn."
DAMAGE = {
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "neither model.safetensors nor"),
    "truncated": (truncate, "not a whole safetensors file"),
    "lying header": (lie_in_header, "not a whole safetensors file"),
    "missing": (
        edit(lambda t: t.pop(LAYER + "k_proj.weight")),
        r"1 missing \(model.layers.1.self_attn.k_proj.weight\)",
    ),
    "unexpected": (edit(lambda t: t.update(extra=torch.ones(2))), r"1 unexpected \(extra\)"),
    "wrong shape": (
        edit(lambda t: t.update({LAYER + "q_proj.weight": torch.ones(3, 64)})),
        r"shape \[3, 64\].*\[64, 64\]",
    ),
    "integers": (
        edit(lambda t: t.update({LAYER + "q_proj.weight": torch.ones(64, 64, dtype=torch.int8)})),
        "quantised weights are not supported",
    ),
    "index without a map": (index([]), "not a safetensors index"),
    "index leaves the folder": (index({"weight_map": {"a": "../other.safetensors"}}), "in the same folder"),
    "index names an absent file": (index({"weight_map": {"a": "b.safetensors"}}), "not in the folder"),
    "index names a pickle": (index({"weight_map": {"a": "pytorch_model.bin"}}), "in the same folder"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_are_named(case: str, tmp_path: Path, seed: int) -> None:
    make_checkpoint(tmp_path, "gqa-tied", seed)
    damage, message = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(WeightError, match=message):
        load(tmp_path)


def test_unknown_architecture_names_the_nearest(tmp_path: Path, seed: int) -> None:
    make_checkpoint(tmp_path, "gqa-tied", seed)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen3ForCausalLMs"]}))
    with pytest.raises(ConfigError, match="did you mean Qwen3ForCausalLM"):
        load(tmp_path)
