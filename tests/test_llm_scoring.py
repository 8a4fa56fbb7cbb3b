"""LLM: scores, embeddings and beam search against the model's own logits and hidden states."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from minivllm import LLM, RequestError, SamplingParams


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", num_kv_blocks=256, max_num_seqs=8, max_num_batched_tokens=24) as llm:
        yield llm
        assert not llm.engine.has_unfinished
        assert llm.engine.block_manager.num_used == 0
        llm.engine.scheduler.check()


def logprobs_after(llm: LLM, ids: list[int]) -> torch.Tensor:
    return torch.log_softmax(llm.engine.runner.prompt_logits(ids), -1)


def test_scores_are_the_logprobs_of_the_tokens(llm: LLM, seed: int) -> None:
    rng = random.Random(seed)
    prompts: list[Any] = ["The king was old.", rng.choices(range(4000), k=60), "A", "The king was old and tired."]
    scores = llm.score(prompts)
    for prompt, score in zip(prompts, scores, strict=True):
        ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        assert score.token_ids == ids
        expected = logprobs_after(llm, ids)[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1).tolist()
        assert score.logprobs == [None, *(pytest.approx(value, abs=1e-3) for value in expected)]
        assert score.total == pytest.approx(sum(expected), abs=1e-2)
        if len(ids) > 1:
            assert score.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-2)
    assert llm.score("The king was old.") == scores[:1], "what is cached changes nothing"


def test_scores_of_continuations(llm: LLM) -> None:
    prompt, ends = "The capital of the", [" kingdom", " zzz"]
    likely, unlikely = llm.score([prompt, prompt], ends)
    for score, end in zip((likely, unlikely), ends, strict=True):
        ids = llm.tokenizer.encode(end)
        assert score.token_ids == llm.tokenizer.encode(prompt) + ids
        assert score.num_scored == len(ids)
        [whole] = llm.score([score.token_ids])
        assert score.total == pytest.approx(sum(value or 0.0 for value in whole.logprobs[-len(ids) :]), abs=1e-3)
    assert likely.total > unlikely.total
    with pytest.raises(RequestError, match="continuations has 1 entries for 2 prompts"):
        llm.score([prompt, prompt], " kingdom")


def hidden_states(llm: LLM, ids: list[int]) -> torch.Tensor:
    """[len(ids), hidden_size], computed at once beside the engine."""
    runner = llm.engine.runner
    with torch.inference_mode():
        states: torch.Tensor = runner.model(*runner._single_sequence(torch.tensor(ids))).float()
    return states


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_the_models_states(llm: LLM, seed: int, pooling: str) -> None:
    rng = random.Random(seed)
    prompts = [rng.choices(range(4000), k=length) for length in (1, 30, 70)]
    for normalize in (False, True):
        for ids, one in zip(prompts, llm.encode(prompts, pooling=pooling, normalize=normalize), strict=True):
            states = hidden_states(llm, ids)
            expected = states[-1] if pooling == "last" else states.mean(0)
            if normalize:
                expected = torch.nn.functional.normalize(expected, dim=0)
            assert one.token_ids == ids
            torch.testing.assert_close(torch.tensor(one.embedding), expected, rtol=1e-3, atol=1e-3)


def test_bad_options_of_embeddings(llm: LLM) -> None:
    for options, message in (
        ({"pooling": "max"}, "pooling is 'max'; it must be one of"),
        ({"pooling": None}, "pooling is None; it must be one of"),
        ({"normalize": 1}, "normalize is 1"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.encode("a", **options)  # type: ignore[arg-type]


def plain_beam_search(llm: LLM, prompt: list[int], width: int, length: int, stop_ids: set[int]) -> list[list[int]]:
    """Ids of the best beams by cumulative logprob / length, each step from logits of whole sequences."""
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for step in range(1, length + 1):
        longer = []
        for total, ids in live:
            values, tokens = logprobs_after(llm, prompt + ids)[-1].topk(2 * width)
            longer += [(total + value.item(), [*ids, int(token)]) for value, token in zip(values, tokens, strict=True)]
        longer.sort(key=lambda beam: -beam[0])
        ended += [beam for beam in longer if beam[1][-1] in stop_ids]
        live = [beam for beam in longer if beam[1][-1] not in stop_ids][:width]
        if step == length:
            ended += live
    ended.sort(key=lambda beam: -beam[0] / len(beam[1]))
    return [ids for _, ids in ended[:width]]


def test_beam_search_against_a_plain_one(llm: LLM) -> None:
    prompts = ["Once upon a time", "The old king"]
    for width, length in ((1, 6), (3, 6)):
        outputs = llm.beam_search(prompts, beam_width=width, max_tokens=length, ignore_eos=True)
        for prompt, output in zip(prompts, outputs, strict=True):
            ids = llm.tokenizer.encode(prompt)
            assert (output.prompt, output.prompt_token_ids) == (prompt, ids)
            assert [beam.token_ids for beam in output.beams] == plain_beam_search(llm, ids, width, length, set())
            for beam in output.beams:
                assert beam.text == llm.tokenizer.decode(beam.token_ids)
                [score] = llm.score([ids], [beam.token_ids])
                assert beam.cumulative_logprob == pytest.approx(score.total, abs=1e-2)
                assert beam.score == pytest.approx(beam.cumulative_logprob / length)
            assert output.text == output.beams[0].text
    greedy = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True))
    narrow = llm.beam_search(prompts, beam_width=1, max_tokens=6, ignore_eos=True)
    assert [one.text for one in narrow] == [one.text for one in greedy], "one beam is greedy search"


def test_beam_search_ends_at_end_tokens(llm: LLM) -> None:
    prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": "What is 2 plus 3?"}])
    stop_ids = set(llm.engine.model_config.eos_token_ids)
    [output] = llm.beam_search([prompt], beam_width=2, max_tokens=12)
    assert [beam.token_ids for beam in output.beams] == plain_beam_search(llm, prompt, 2, 12, stop_ids)
    assert output.beams[0].finish_reason == "stop"
    assert output.beams[0].token_ids[-1] in stop_ids


def test_beam_search_finds_its_beams_in_the_cache(llm: LLM, seed: int) -> None:
    prompt = random.Random(seed).choices(range(4000), k=160)
    llm.clear_prefix_cache()
    stats = llm.engine.block_manager.stats
    tokens, cached = stats.prompt_tokens, stats.cached_tokens
    llm.beam_search([prompt], beam_width=4, max_tokens=10)
    asked, found = stats.prompt_tokens - tokens, stats.cached_tokens - cached
    assert found >= 0.9 * (asked - len(prompt))


def test_beam_search_is_bounded_by_the_context() -> None:
    with LLM(device="cpu", num_kv_blocks=64, max_model_len=20) as llm:
        ids = llm.tokenizer.encode("Once upon a time")
        [output] = llm.beam_search([ids], beam_width=2, max_tokens=10**6, ignore_eos=True)
        assert {len(beam.token_ids) for beam in output.beams} == {20 - len(ids)}
        with pytest.raises(RequestError, match="has 20 tokens; it must have from 1 to 19"):
            llm.beam_search([[1] * 20])
        with pytest.raises(RequestError, match=r"prompt_token_ids\[0\] is -1"):
            llm.beam_search([[-1]])


def test_bad_options_of_beam_search(llm: LLM) -> None:
    for options, message in (
        ({"beam_width": 0}, "beam_width is 0; it must be an integer from 1 to 64"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"length_penalty": math.nan}, "length_penalty is nan"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.beam_search("a", **options)  # type: ignore[arg-type]


def test_logits_that_are_no_numbers_are_told() -> None:
    with LLM(device="cpu", num_kv_blocks=64) as llm:
        llm.engine.runner.model.get_parameter("model.norm.weight").data.fill_(math.nan)
        for use in (lambda: llm.score("A fox"), lambda: llm.encode("A fox"), lambda: llm.beam_search("A fox")):
            with pytest.raises(RequestError, match="sequence 1 of 1 could not be computed: it ended with 'error'"):
                use()
        assert not llm.engine.has_unfinished
