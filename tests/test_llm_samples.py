"""LLM: parallel samples, the best of them, and logprobs, on the bundled model."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch

from minivllm import LLM, RequestError, SamplingParams
from minivllm.request import Logprob


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", num_kv_blocks=256, max_num_seqs=8) as llm:
        yield llm
        assert not llm.engine.has_unfinished
        assert llm.engine.block_manager.num_used == 0
        llm.engine.scheduler.check()


def reference(llm: LLM, ids: list[int]) -> torch.Tensor:
    """Logprobs [len(ids), vocab] of the token after each, computed without the engine."""
    return torch.log_softmax(llm.engine.runner.prompt_logits(ids), -1)


def assert_told(position: dict[int, Logprob], expected: torch.Tensor, token: int, num_top: int) -> None:
    """`position` tells `token` first and the likeliest `num_top`, as in `expected` [vocab]."""
    assert next(iter(position)) == token
    assert len(position) in (num_top, num_top + 1) and num_top <= len(position)
    for other, one in position.items():
        assert one.logprob == pytest.approx(expected[other].item(), abs=1e-3)
        likelier = int((expected > expected[other] + 1e-3).sum()), int((expected > expected[other] - 1e-3).sum())
        assert likelier[0] < one.rank <= max(likelier[1], likelier[0] + 1)
    least = min((one.logprob for other, one in position.items() if one.rank <= num_top), default=0.0)
    assert int((expected > least + 1e-3).sum()) <= num_top


def test_samples_are_the_same_in_any_company(llm: LLM, seed: int) -> None:
    params = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=seed, ignore_eos=True)
    [output] = llm.generate("My dear sister", params)
    assert [one.index for one in output.outputs] == [0, 1, 2]
    assert len({tuple(one.token_ids) for one in output.outputs}) == 3
    again = llm.generate(["The sea", "My dear sister", "My dear"], params)[1]
    assert again.outputs == output.outputs
    alone = llm.generate("My dear sister", SamplingParams(temperature=1.0, max_tokens=8, seed=seed, ignore_eos=True))
    assert alone[0].outputs[0].token_ids == output.outputs[0].token_ids, "sample 0 draws what one sample draws"


def test_samples_share_the_blocks_of_their_prompt(llm: LLM) -> None:
    prompt = list(range(100, 100 + 16 * 20 + 5))
    llm.clear_prefix_cache()
    stream = llm.stream(prompt, SamplingParams(n=6, max_tokens=8, ignore_eos=True))
    most = max(llm.engine.block_manager.num_used for _ in stream)
    assert most <= 20 + 6 * 2


def test_streamed_samples_are_the_generated_ones(llm: LLM, seed: int) -> None:
    params = SamplingParams(n=3, temperature=0.9, max_tokens=10, seed=seed)
    prompts = ["A cat", "A dog"]
    texts: dict[tuple[int, int], str] = defaultdict(str)
    reasons, outputs = {}, {}
    for delta in llm.stream(prompts, params):
        place = delta.index, delta.sample
        assert place not in reasons, "a piece after the end"
        texts[place] += delta.text
        if delta.finish_reason is not None:
            reasons[place] = delta.finish_reason
        if delta.output is not None:
            outputs[delta.index] = delta.output
    expected = llm.generate(prompts, params)
    for index, output in enumerate(expected):
        assert outputs[index].outputs == output.outputs
        assert [texts[index, sample] for sample in range(3)] == [one.text for one in output.outputs]
        assert [reasons[index, sample] for sample in range(3)] == [one.finish_reason for one in output.outputs]


def test_best_of_returns_the_likeliest(llm: LLM, seed: int) -> None:
    options = {"temperature": 1.2, "max_tokens": 6, "seed": seed, "ignore_eos": True}
    drawn = llm.generate("The king", SamplingParams(n=6, logprobs=0, **options))[0].outputs
    best = llm.generate("The king", SamplingParams(n=2, best_of=6, **options))[0].outputs
    ranked = sorted(drawn, key=lambda one: -(one.cumulative_logprob or 0.0))[:2]
    assert [one.token_ids for one in best] == [one.token_ids for one in ranked]
    assert [one.index for one in best] == [0, 1]
    assert [one.cumulative_logprob for one in best] == [pytest.approx(one.cumulative_logprob) for one in ranked]
    assert all(one.logprobs is None for one in best)


def test_best_of_cannot_be_streamed(llm: LLM) -> None:
    with pytest.raises(RequestError, match="best_of is 3 and n is 2, but which samples are the best is known only"):
        llm.stream("a", SamplingParams(n=2, best_of=3))
    assert len(list(llm.stream("a", SamplingParams(n=2, best_of=2, max_tokens=1, ignore_eos=True)))) == 2


@pytest.mark.parametrize("num_top", [0, 3])
def test_logprobs_of_drawn_tokens(llm: LLM, seed: int, num_top: int) -> None:
    """They are of the model's own logits: temperature, filters, penalties and biases do not show."""
    params = SamplingParams(
        n=2, temperature=1.5, top_k=50, max_tokens=6, seed=seed, logprobs=num_top, ignore_eos=True,
        presence_penalty=1.0, logit_bias={300: 2.0},
    )  # fmt: skip
    [output] = llm.generate("Once upon a time", params)
    for one in output.outputs:
        assert one.logprobs is not None
        expected = reference(llm, output.prompt_token_ids + one.token_ids)[len(output.prompt_token_ids) - 1 : -1]
        total = sum(row[token].item() for row, token in zip(expected, one.token_ids, strict=True))
        assert one.cumulative_logprob == pytest.approx(total, abs=1e-2)
        for position, row, token in zip(one.logprobs, expected, one.token_ids, strict=True):
            assert_told(position, row, token, num_top)
            assert position[token].decoded_token == llm.tokenizer.decode([token])
    assert output.prompt_logprobs is None


@pytest.mark.parametrize("num_top", [0, 2])
def test_logprobs_of_prompts(llm: LLM, seed: int, num_top: int) -> None:
    rng = random.Random(seed)
    prompts = [rng.choices(range(4000), k=length) for length in (1, 2, 33, 40)]
    params = SamplingParams(max_tokens=3, prompt_logprobs=num_top, ignore_eos=True, n=2)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        told = output.prompt_logprobs
        assert told is not None and told[0] is None and len(told) == len(prompt)
        expected = reference(llm, prompt)
        for place, position in enumerate(told[1:], 1):
            assert position is not None
            assert_told(position, expected[place - 1], prompt[place], num_top)
        assert all(one.logprobs is None for one in output.outputs)
