"""The engine between scheduler and runner: failures, aborts, seeds, and a NaN that stays in its request."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minivllm.config import EngineConfig
from minivllm.engine import LLMEngine
from minivllm.errors import ConfigError, EngineDeadError, QueueFullError, RequestError
from minivllm.request import FinishReason
from minivllm.sampling_params import SamplingParams
from minivllm.trace_reader import read_trace
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
    assert engine.block_manager.num_used == 0


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
    [bad] = engine.add_request("bad", [poisoned], GREEDY)
    [good] = engine.add_request("good", [1, 2, 3], GREEDY)
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
    [request] = fresh.add_request("a", [5, 6], GREEDY)
    [ignoring] = fresh.add_request("b", [5, 6], SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True))
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


def test_samples_draw_apart_and_the_first_as_if_alone(engine: LLMEngine) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=12, seed=5)
    [alone] = engine.add_request("alone", [1, 2, 3], params)
    drain(engine)
    samples = engine.add_request("many", [1, 2, 3], replace(params, n=6))
    drain(engine)
    assert samples[0].output_token_ids == alone.output_token_ids
    assert len({tuple(sample.output_token_ids) for sample in samples}) == 6
    again = engine.add_request("again", [1, 2, 3], replace(params, n=6))
    engine.add_request("neighbour", [4] * 20, params)
    drain(engine)
    assert [one.output_token_ids for one in again] == [one.output_token_ids for one in samples]


def test_samples_at_temperature_0_share_the_prompt_and_agree(engine: LLMEngine) -> None:
    [alone] = engine.add_request("alone", list(range(21)), GREEDY)
    drain(engine)
    engine.clear_cache()
    samples = engine.add_request("many", list(range(21)), replace(GREEDY, n=4))
    drain(engine)
    assert [sample.output_token_ids for sample in samples] == [alone.output_token_ids] * 4
    assert [sample.num_cached_tokens for sample in samples] == [0, 20, 20, 20]


def test_a_stop_string_found_outside_ends_one_sequence(engine: LLMEngine) -> None:
    first, second = engine.add_request("a", [1, 2], replace(GREEDY, n=2))
    while not second.output_token_ids:
        engine.step()
    engine.finish(first, FinishReason.STOP)
    drain(engine)
    assert first.finish_reason is FinishReason.STOP
    assert len(first.output_token_ids) < len(second.output_token_ids) == 10


def test_a_deadline_is_told(engine: LLMEngine) -> None:
    [late] = engine.add_request("late", [1, 2], replace(GREEDY, timeout=1e-9))
    [other] = engine.add_request("other", [1, 2], GREEDY)
    tokens = drain(engine)
    assert (late.finish_reason, tokens["late"]) == (FinishReason.TIMEOUT, [None])
    assert len(other.output_token_ids) == 10


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({"stop": "x"}, {}, "stop is .*, but the engine knows only token ids"),
        ({"bad_words": ["x"]}, {}, r"bad_words\[0\] is 'x', but the engine knows only token ids"),
        ({"bad_words": [[5, 199]]}, {}, r"bad_words\[0\]\[1\] is 199; it must be an integer from 0 to 198"),
        ({"logit_bias": {199: 1.0}}, {}, r"logit_bias\[0\] is 199"),
        ({"allowed_token_ids": [3, 500]}, {}, r"allowed_token_ids\[1\] is 500"),
        ({"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 2}, {}, "nothing could be drawn"),
        ({}, {"priority": "high"}, "priority is 'high'; it must be an integer"),
        ({}, {"cache_salt": 5}, "cache_salt is 5; it must be a str of 1 to 256"),
        ({}, {"pooling": "sum"}, "pooling is 'sum'; it must be one of 'last', 'mean'"),
    ],
)
def test_what_the_engine_refuses(
    engine: LLMEngine, params: dict[str, object], options: dict[str, object], message: str
) -> None:
    for method in (engine.add_request, engine.check_request):
        with pytest.raises(RequestError, match=message):
            method("a", [1, 2], SamplingParams(max_tokens=4, **params), **options)
    assert not engine.has_unfinished


def test_check_request_adds_nothing_and_refuses_what_never_fits(engine: LLMEngine) -> None:
    engine.check_request("a", [1, 2], GREEDY)
    assert not engine.has_unfinished
    with pytest.raises(RequestError, match="must have from 1 to 255"):
        engine.check_request("a", [1] * 300, GREEDY)
    engine.check_request("a", [1] * 300, replace(GREEDY, truncate_prompt_tokens=7))
    [request] = engine.add_request("a", list(range(100)), replace(GREEDY, truncate_prompt_tokens=7))
    assert request.prompt_token_ids == list(range(93, 100))
    drain(engine)


def test_a_bounded_queue_and_a_cache_without_prefixes(tmp_path: Path, seed: int) -> None:
    make_checkpoint(tmp_path, "gqa-tied", seed)
    config = EngineConfig(
        device="cpu", num_kv_blocks=64, max_num_seqs=1, max_num_waiting=2, enable_prefix_caching=False
    )
    engine = LLMEngine(tmp_path, config)
    requests = [engine.add_request(f"r{i}", [1] * 40, GREEDY)[0] for i in range(2)]
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        engine.add_request("r2", [1] * 40, GREEDY)
    drain(engine)
    assert [request.num_cached_tokens for request in requests] == [0, 0]
    assert engine.block_manager.num_cached == 0


def test_a_trace_is_written_and_can_be_read(tmp_path: Path, seed: int) -> None:
    make_checkpoint(tmp_path, "gqa-tied", seed)
    trace = tmp_path / "trace.json"
    engine = LLMEngine(tmp_path, EngineConfig(device="cpu", num_kv_blocks=64, trace=str(trace)))
    engine.add_request("first", [1] * 40, GREEDY)
    drain(engine)
    engine.add_request("second", [1] * 40, GREEDY)
    drain(engine)
    engine.close()
    read = read_trace(trace)
    assert [(request.label, request.cached_tokens, request.output_tokens) for request in read.requests] == [
        ("first", 0, 10),
        ("second", 32, 10),
    ]
    assert sum(step.prefill_tokens for step in read.steps) == 40 + 8
    assert sum(step.decode_rows for step in read.steps) == 18
    with pytest.raises(ConfigError, match="cannot be written"):
        LLMEngine(tmp_path, EngineConfig(device="cpu", num_kv_blocks=64, trace=str(tmp_path / "no" / "trace.json")))
