"""Hand-made batches through a small model: what is drawn and told equals what whole passes over the sequences say."""

from __future__ import annotations

import contextlib
import random
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3ForCausalLM

from minivllm import ops
from minivllm.batch import TokenLogprobs
from minivllm.layers import attention
from minivllm.runner import readouts
from minivllm.runner.logits_editor import LogitsEditor
from minivllm.runner.readouts import Readouts
from tests.ops.support import no_device_sync
from tests.runner.driver import BLOCK, VOCAB, Driver, Flight, Sequence, check_logprobs, random_wants
from tests.small_models import make_checkpoint

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Qwen3ForCausalLM]:
    torch.set_float32_matmul_precision("highest")
    folder, seed = tmp_path_factory.mktemp("model"), random.randrange(2**31)
    print(f"weights of seed {seed}")
    return folder, make_checkpoint(folder, "gqa-tied", seed)


@pytest.fixture(params=DEVICES)
def driver(model: tuple[Path, Qwen3ForCausalLM], request: pytest.FixtureRequest) -> Driver:
    return Driver(model[0], request.param)


def prompt_of(rng: random.Random, low: int, high: int) -> list[int]:
    return rng.choices(range(VOCAB), k=rng.randint(low, high))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_draws_and_logprobs_with_steps_in_flight(
    driver: Driver, depth: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots with and without wishes, and used again, with up to `depth` batches launched before one is read."""
    monkeypatch.setattr(readouts, "SCORED_AT_ONCE", depth)
    rng = random.Random(seed)
    out: deque[Flight] = deque()
    running: dict[int, Sequence] = {}
    ended: list[Sequence] = []
    for _ in range(40):
        idle = [slot for slot in range(5) if slot not in running]
        chunks = []
        for slot in idle[: rng.randint(0, 2)]:
            wants = random_wants(rng, VOCAB) if rng.random() < 0.7 else {}
            wants |= {"logprobs": rng.randint(0, 5)} if rng.random() < 0.5 else {}
            running[slot] = driver.open(slot, prompt_of(rng, 1, 20), **wants)
        decodes = []
        for sequence in running.values():
            if sequence.num_scheduled < sequence.num_prompt:
                chunks.append((sequence, rng.randint(1, 12)))
            elif rng.random() < 0.9:
                decodes.append(sequence)
        if decodes or chunks:
            out.append(driver.launch(decodes, chunks))
        while len(out) >= depth:
            driver.land(out.popleft())
        for slot, sequence in list(running.items()):
            if sequence.num_scheduled > sequence.num_prompt and rng.random() < 0.06:
                ended.append(running.pop(slot))
    while out:
        driver.land(out.popleft())
    ended += [sequence for sequence in running.values() if len(sequence.tokens) > sequence.num_prompt]
    assert len(ended) > 3
    for sequence in ended:
        driver.check_draws(sequence)


def test_a_preempted_sequence_goes_on_as_if_nothing_had_happened(driver: Driver, seed: int) -> None:
    rng = random.Random(seed)
    wants: dict[str, Any] = {
        "presence_penalty": 0.5, "frequency_penalty": 0.4, "repetition_penalty": 1.3, "min_tokens": 9,
        "stop_ids": tuple(range(0, VOCAB, 2)), "bad_words": tuple((a, rng.randrange(VOCAB)) for a in range(VOCAB)),
    }  # fmt: skip
    prompt = prompt_of(rng, 10, 30)
    first = driver.open(0, prompt, **wants)
    driver.step([], [(first, 100)])
    for _ in range(12):
        driver.step([first])
    known = first.tokens[: len(prompt) + 5]
    again = driver.open(3, known, num_prompt=len(prompt), **wants)
    while again.num_scheduled < len(known):
        driver.step([], [(again, 9)])
    while len(again.tokens) < len(first.tokens):
        driver.step([again])
    driver.check_draws(first)
    driver.check_draws(again)
    assert again.tokens == first.tokens


def test_neighbours_with_wishes_change_no_draw(driver: Driver, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [prompt_of(rng, 1, 20) for _ in range(3)]
    texts = []
    for busy in (False, True):
        plain = [driver.open(slot, prompt, temperature=1.0) for slot, prompt in enumerate(prompts)]
        others = [
            driver.open(slot, [5], presence_penalty=1.0, logprobs=2, allowed_token_ids=(1, 2), pooling="mean")
            for slot in ((3, 4) if busy else ())
        ]
        driver.step([], [(sequence, 100) for sequence in others[:1] + plain + others[1:]])
        for _ in range(10):
            driver.step(others[:1] + plain + others[1:])
        texts.append([sequence.tokens for sequence in plain])
        assert all(token in (1, 2) for sequence in others for token in sequence.tokens[1:])
    assert texts[0] == texts[1]


def test_no_logprobs_of_a_failed_draw(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    head = driver.runner.model.logits
    one, two = driver.open(0, [1, 2], logprobs=2), driver.open(1, [3], logprobs=1, pooling="last")

    def failing(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        logits[1] = torch.nan
        return logits

    monkeypatch.setattr(driver.runner.model, "logits", failing)
    result = driver.step([], [(one, 9), (two, 9)])
    assert result.token_ids[1] == -1 != result.token_ids[0]
    assert list(result.logprobs) == [0]
    assert list(result.embeddings) == [1]


@pytest.mark.parametrize("chunk", [1, 7, 300])
def test_prompt_logprobs(driver: Driver, chunk: int, seed: int) -> None:
    rng = random.Random(seed)
    sequences = [driver.open(slot, prompt_of(rng, 170, 200), prompt_logprobs=top) for slot, top in enumerate((0, 3, 8))]
    sequences.append(driver.open(3, prompt_of(rng, 170, 200)))
    sequences.append(driver.open(4, [7], prompt_logprobs=2))
    while left := [sequence for sequence in sequences if sequence.num_scheduled < sequence.num_prompt]:
        driver.step([], [(sequence, chunk) for sequence in left])
    for sequence in sequences[:3]:
        assert sequence.extras is not None and sequence.extras.prompt_logprobs is not None
        prompt = sequence.tokens[: sequence.num_prompt]
        check_logprobs(sequence.scored, prompt[1:], driver.logits(prompt)[:-1], sequence.extras.prompt_logprobs)
    assert not sequences[3].scored and not sequences[4].scored


def test_a_prompt_is_scored_only_once_when_it_is_computed_again(driver: Driver, seed: int) -> None:
    """After preemption the drawn tokens are part of what is computed, but not of the prompt that is scored."""
    tokens = prompt_of(random.Random(seed), 20, 30)
    sequence = driver.open(0, tokens, num_prompt=15, prompt_logprobs=1, logprobs=0)
    result = driver.step([], [(sequence, 100)])
    assert [entry.token_id for entry in sequence.scored] == tokens[1:15]
    assert isinstance(result.logprobs[0], TokenLogprobs) and result.logprobs[0].top == ()
    check_logprobs(sequence.told, sequence.tokens[-1:], driver.logits(tokens)[-1:], 0)


@pytest.mark.parametrize("chunk", [1, 13, 200])
def test_embeddings(driver: Driver, model: tuple[Path, Qwen3ForCausalLM], chunk: int, seed: int) -> None:
    rng = random.Random(seed)
    sequences = [
        driver.open(slot, prompt_of(rng, 1, 60), pooling=pooling)
        for slot, pooling in enumerate(("last", "mean", "mean", "last", "mean"))
    ]
    plain = driver.open(5, prompt_of(rng, 30, 60), logprobs=1)
    waiting = [*sequences, plain]
    while waiting:
        driver.step([], [(sequence, chunk) for sequence in waiting])
        waiting = [sequence for sequence in waiting if sequence.num_scheduled < sequence.num_prompt]
    assert plain.embedding is None
    for sequence in sequences:
        prompt = sequence.tokens[: sequence.num_prompt]
        with torch.no_grad():
            hidden = model[1].model(torch.tensor([prompt])).last_hidden_state[0]
        assert sequence.extras is not None
        expected = hidden[-1] if sequence.extras.pooling == "last" else hidden.mean(0)
        torch.testing.assert_close(torch.tensor(sequence.embedding), expected, atol=1e-4, rtol=1e-4)
        driver.check_draws(sequence)


def test_a_mean_begins_anew_with_its_slot(driver: Driver, seed: int) -> None:
    rng = random.Random(seed)
    interrupted = driver.open(0, prompt_of(rng, 30, 40), pooling="mean")
    driver.step([], [(interrupted, 20)])
    prompt = prompt_of(rng, 5, 10)
    one = driver.open(0, prompt, pooling="mean")
    driver.step([], [(one, 100)])
    two = driver.open(1, prompt, pooling="mean")
    driver.step([], [(two, 100)])
    assert one.embedding is not None and two.embedding is not None
    torch.testing.assert_close(torch.tensor(one.embedding), torch.tensor(two.embedding))


def test_copied_blocks_continue_the_sequence(driver: Driver, seed: int) -> None:
    """A sample that shares whole blocks and a copy of the partial last one; both go on at once, then differ."""
    rng = random.Random(seed)
    prompt = rng.choices(range(VOCAB), k=2 * BLOCK + rng.randint(2, BLOCK - 1))
    first = driver.open(0, prompt, logprobs=4)
    driver.step([], [(first, 100)])
    driver.step([first])
    second = driver.open(1, prompt, logprobs=4)
    driver.share(second, first, len(prompt) - 1)
    driver.step([first], [(second, 100)])  # the block is copied before this step's row of `first` writes to it
    third = driver.open(2, prompt, logprobs=4, allowed_token_ids=tuple(range(100)))
    driver.share(third, first, len(prompt) - 1)
    driver.step([first, second], [(third, 100)])
    for _ in range(BLOCK + 2):
        driver.step([third, second, first])
    assert second.tokens == first.tokens[: len(second.tokens)]
    assert not set(first.table[2:]) & set(second.table[2:]) and first.table[:2] == second.table[:2]
    for sequence in (first, second, third):
        driver.check_draws(sequence)


def test_copies_are_simultaneous_and_reach_every_layer(driver: Driver) -> None:
    layers = driver.runner.kv.layers
    for layer in layers:
        layer.k.normal_()
        layer.v.normal_()
    before = [(layer.k.clone(), layer.v.clone()) for layer in layers]
    for source, target in ((2, 3), (3, 2), (3, 4), (5, 6)):
        driver.copy(source, target)
    driver.free_blocks = [9]
    driver.step([], [(driver.open(0, [1]), 1)])
    sources = list(range(driver.runner.kv.num_blocks))
    sources[3], sources[2], sources[4], sources[6] = 2, 3, 3, 5
    kept = torch.tensor([block for block in range(len(sources)) if block != 9], device=driver.runner.device)
    moved = torch.tensor(sources, device=driver.runner.device)[kept]
    for layer, (k, v) in zip(layers, before, strict=True):
        assert torch.equal(layer.k[kept], k[moved]) and torch.equal(layer.v[kept], v[moved])


def test_the_forecast_runs_everything_and_leaves_nothing(
    model: tuple[Path, Qwen3ForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(model[0], max_num_batched_tokens=50)
    seen: list[str] = []
    for owner, name in (
        (LogitsEditor, "drawn"),
        (Readouts, "_score"),
        (Readouts, "_embeddings"),
        (Readouts, "read_ids"),
    ):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, name=name, original=original: (seen.append(name), original(*args))[1]
        )
    before = driver.runner.editor, driver.runner.readouts
    driver.runner._run_largest_step(driver.config)
    assert seen == ["_score", "_embeddings", "drawn", "read_ids"]
    assert driver.runner.editor is not before[0] and driver.runner.readouts is not before[1]
    sequence = driver.open(0, [1, 2, 3])
    driver.step([], [(sequence, 9)])
    driver.step([sequence])
    driver.check_draws(sequence)


@pytest.mark.gpu
def test_a_launch_never_waits_for_the_gpu(
    model: tuple[Path, Qwen3ForCausalLM], monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    if ops.served_by()["paged_attention"]["CUDA"] == "reference":  # it reads the lengths on the host
        monkeypatch.setattr(attention, "paged_attention", lambda q, *others, **options: q.clone())
    driver = Driver(model[0], "cuda")
    for strict in (False, True):  # the first round loads kernels and takes memory
        sequences = [
            driver.open(
                slot, prompt_of(rng, 20, 40), presence_penalty=1.0, bad_words=((1,), (2, 3)), logit_bias=((4, 1.0),),
                allowed_token_ids=tuple(range(150)), min_tokens=2, stop_ids=(5,), logprobs=3, prompt_logprobs=2,
                pooling=rng.choice(["last", "mean"]),
            )
            for slot in range(4)
        ]  # fmt: skip
        driver.copy(2, 3)
        with no_device_sync() if strict else contextlib.nullcontext():
            flights = [driver.launch([], [(sequence, 10) for sequence in sequences])]
            flights.append(driver.launch([], [(sequence, 100) for sequence in sequences]))
            flights.append(driver.launch(sequences[1:]))
        for flight in flights:
            driver.land(flight)
