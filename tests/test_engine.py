"""The engine between scheduler and runner: failures, aborts, seeds, and a NaN that stays in its request."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.engine import LLMEngine
from minivllm.errors import EngineDeadError, RequestError
from minivllm.request import FinishReason
from minivllm.sampling_params import SamplingParams
from tests.small_models import make_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=10)


@pytest.fixture
def engine(tmp_path: Path, seed: int) -> LLMEngine:
    make_checkpoint(tmp_path, "gqa-tied", seed)
    return LLMEngine(tmp_path, EngineConfig(device="cpu", num_kv_blocks=64, max_num_seqs=4))


def drain(engine: LLMEngine) -> dict[str, list[int | None]]:
    tokens: dict[str, list[int | None]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).append(output.token_id)
        engine.scheduler.check()
    return tokens


def test_aborts_at_random_moments_leave_the_others_unchanged(engine: LLMEngine, seed: int) -> None:
    rng = random.Random(seed)
    prompts = {f"r{i}": rng.choices(range(199), k=rng.randint(1, 50)) for i in range(12)}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
    undisturbed = drain(engine)
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
    aborted = set(rng.sample(sorted(prompts), 6))
    left, tokens = sorted(aborted), {name: [] for name in prompts}  # type: ignore[var-annotated]
    while engine.has_unfinished:
        if left and rng.random() < 0.5:
            engine.abort(left.pop())
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
        engine.scheduler.check()
    for name in prompts.keys() - aborted:
        assert tokens[name] == undisturbed[name]
    assert engine.block_manager.num_free == 64


def test_nan_logits_fail_their_request_alone(engine: LLMEngine) -> None:
    poisoned = 7
    engine.add_request("before", [1, 2, 3], GREEDY)
    expected = drain(engine)["before"]
    engine.runner.model.get_parameter("model.embed_tokens.weight").data[poisoned] = float("nan")
    # The tied head makes every logit of token 7 a NaN, so only a separate head keeps the failure in one request.
    head = torch.nn.Linear(64, 199, bias=False)
    clean = engine.runner.model.get_parameter("model.embed_tokens.weight").data.clone()
    clean[poisoned] = 0.0
    head.weight.data = clean
    engine.runner.model.logits = head.forward  # type: ignore[method-assign]
    bad = engine.add_request("bad", [poisoned], GREEDY)
    good = engine.add_request("good", [1, 2, 3], GREEDY)
    tokens = drain(engine)
    assert bad.finish_reason is FinishReason.ERROR
    assert tokens["bad"] == [None]
    assert good.finish_reason is FinishReason.LENGTH
    assert len(expected) == len(tokens["good"]) == 10
    assert drain(engine) == {}


def test_eos_ids_end_a_request_unless_ignored(engine: LLMEngine, tmp_path: Path) -> None:
    engine.add_request("a", [5, 6], GREEDY)
    tokens = drain(engine)["a"]
    stop = tokens[3]
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{stop}, 198]}}')
    fresh = LLMEngine(tmp_path, EngineConfig(device="cpu", num_kv_blocks=64))
    request = fresh.add_request("a", [5, 6], GREEDY)
    ignoring = fresh.add_request("b", [5, 6], SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True))
    drain(fresh)
    assert request.output_token_ids == tokens[: tokens.index(stop) + 1]
    assert request.finish_reason is FinishReason.STOP
    assert ignoring.output_token_ids == tokens


def test_a_failed_step_ends_the_engine_loudly(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add_request("a", [1], GREEDY)

    def broken(batch: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(engine.runner, "launch", broken)
    with pytest.raises(EngineDeadError, match="MemoryError: no more"):
        engine.step()
    with pytest.raises(EngineDeadError, match="stopped in an earlier step"):
        engine.add_request("b", [1], GREEDY)


def test_prompt_logits_checks_its_ids(engine: LLMEngine) -> None:
    for ids, message in (([], "has 0 tokens"), ([199], "outside"), ([1] * 300, "has 300 tokens")):
        with pytest.raises(RequestError, match=message):
            engine.runner.prompt_logits(ids)


def test_ids_in_use_are_refused(engine: LLMEngine) -> None:
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request("a", [2], GREEDY)
    assert engine.abort("a")
    assert not engine.abort("a")


def test_ids_outside_the_vocabulary_are_refused(engine: LLMEngine) -> None:
    with pytest.raises(RequestError, match=r"prompt_token_ids\[1\] is 199; it must be an integer from 0 to 198"):
        engine.add_request("a", [1, 199], GREEDY)
    with pytest.raises(RequestError, match=r"stop_token_ids\[0\] is 500"):
        engine.add_request("a", [1], SamplingParams(stop_token_ids=[500]))
    assert not engine.has_unfinished
