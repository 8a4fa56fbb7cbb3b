"""LLM: where texts end and what is in them: stop strings, bad words, special tokens, cut prompts; failures in texts."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from minivllm import LLM, RequestError, SamplingParams
from tests.text.test_stop import expected

PROMPTS = ["Once upon a time", "The old king said,", "In the deep forest"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", num_kv_blocks=256, max_num_seqs=8) as llm:
        yield llm
        assert not llm.engine.has_unfinished
        assert llm.engine.block_manager.num_used == 0
        llm.engine.scheduler.check()


def greedy(max_tokens: int = 20, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens(llm: LLM, seed: int, include: bool) -> None:
    rng = random.Random(seed)
    free = llm.generate(PROMPTS, greedy())
    params, wanted = [], []
    for output in free:
        begin = rng.randrange(len(output.text) - 6)
        stops = [output.text[begin : begin + 6], "\u2603"]
        params.append(greedy(stop=stops, include_stop_str_in_output=include))
        wanted.append(expected(output.text, stops, include))
    texts = [""] * len(PROMPTS)
    for delta in llm.stream(PROMPTS, params):
        texts[delta.index] += delta.text
    for output, text, (whole, stop), full in zip(llm.generate(PROMPTS, params), texts, wanted, free, strict=True):
        [one] = output.outputs
        assert one.text == text == whole
        assert (one.finish_reason, one.stop_reason) == ("stop", stop)
        ids = full.outputs[0].token_ids[: len(one.token_ids)]
        assert one.token_ids == ids
        end = len(whole) + (0 if include else len(stop or ""))
        assert len(llm.tokenizer.decode(ids[:-1])) < end <= len(llm.tokenizer.decode(ids)), "a token too many or few"


def test_a_stop_string_ends_the_work(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    [free] = llm.generate(PROMPTS[0], greedy())
    step, num_steps = llm.engine.step, 0

    def counted() -> object:
        nonlocal num_steps
        num_steps += 1
        return step()

    monkeypatch.setattr(llm.engine, "step", counted)
    [stopped] = llm.generate(PROMPTS[0], greedy(500, stop=free.text[10:14]))
    assert num_steps <= len(stopped.outputs[0].token_ids) + 2
    assert not llm.engine.has_unfinished


def test_stop_strings_are_not_looked_for_too_early(llm: LLM) -> None:
    [free] = llm.generate(PROMPTS[:1], greedy())
    stop = free.text[1:3]
    [late] = llm.generate(PROMPTS[:1], greedy(stop=stop, min_tokens=20))
    assert late.text == free.text
    [early] = llm.generate(PROMPTS[:1], greedy(stop=stop, min_tokens=1))
    assert early.text == free.text[:1]


def test_samples_stop_apart(llm: LLM, seed: int) -> None:
    options: dict[str, Any] = {"n": 4, "temperature": 1.0, "max_tokens": 12, "seed": seed, "ignore_eos": True}
    [free] = llm.generate(PROMPTS[0], SamplingParams(**options))
    [stopped] = llm.generate(PROMPTS[0], SamplingParams(**options, stop=[",", "e"]))
    for one, other in zip(free.outputs, stopped.outputs, strict=True):
        text, stop = expected(one.text, [",", "e"], False)
        assert (other.text, other.stop_reason) == (text, stop)
        assert other.finish_reason == ("length" if stop is None else "stop")


def test_stop_tokens_are_told(llm: LLM) -> None:
    [free] = llm.generate(PROMPTS[0], greedy())
    token = free.outputs[0].token_ids[3]
    [stopped] = llm.generate(PROMPTS[0], greedy(stop_token_ids=[token]))
    assert stopped.outputs[0].stop_reason == token
    ended = llm.chat([{"role": "user", "content": "What is 2 plus 3?"}], SamplingParams(temperature=0.0, max_tokens=64))
    assert (ended[0].outputs[0].finish_reason, ended[0].outputs[0].stop_reason) == ("stop", None)


def contains(ids: list[int], part: list[int]) -> bool:
    return any(ids[begin : begin + len(part)] == part for begin in range(len(ids)))


def test_bad_words_never_come(llm: LLM) -> None:
    """As the tokens that spell them: a model may still find other tokens for the same letters."""
    for prompt in PROMPTS:
        [free] = llm.generate(prompt, greedy())
        words = sorted({word.strip(".,;:!?\"'") for word in free.text.split()} - {""})
        spelled = [llm.tokenizer.encode(form) for word in words for form in (word, f" {word}")]
        came = [ids for ids in spelled if contains(free.outputs[0].token_ids, ids)]
        [output] = llm.generate(prompt, greedy(bad_words=words))
        assert len(came) > 3, "the words of the text are not found in its tokens, so this shows little"
        assert not [ids for ids in spelled if contains(output.outputs[0].token_ids, ids)]
        [as_ids] = llm.generate(prompt, greedy(bad_words=spelled))
        assert as_ids.outputs == output.outputs


def test_special_tokens_show_if_asked_for(llm: LLM) -> None:
    messages = [{"role": "user", "content": "What is 2 plus 3?"}]
    hidden, shown = (
        llm.chat(messages, SamplingParams(temperature=0.0, max_tokens=64, skip_special_tokens=skip))[0].outputs[0]
        for skip in (True, False)
    )
    assert hidden.token_ids == shown.token_ids
    assert shown.text == llm.tokenizer.decode(shown.token_ids, skip_special_tokens=False)
    assert shown.text.startswith(hidden.text) and shown.text != hidden.text


def test_long_prompts_are_cut_at_the_front(llm: LLM, seed: int) -> None:
    prompt = random.Random(seed).choices(range(4000), k=3000)
    [cut] = llm.generate(prompt, greedy(4, truncate_prompt_tokens=30))
    [short] = llm.generate([prompt[-30:]], greedy(4, truncate_prompt_tokens=31))
    assert cut.prompt_token_ids == short.prompt_token_ids == prompt[-30:]
    assert cut.outputs[0].token_ids == short.outputs[0].token_ids
    with pytest.raises(RequestError, match="has 3000 tokens"):
        llm.generate([prompt], greedy(4))


def test_a_deadline_ends_a_request_with_what_it_has(llm: LLM) -> None:
    late, other = llm.generate(PROMPTS[:2], [greedy(900, timeout=0.05), greedy(5)])
    assert late.outputs[0].finish_reason == "timeout"
    assert len(late.outputs[0].token_ids) < 900
    assert late.text == llm.tokenizer.decode(late.outputs[0].token_ids)
    assert other.outputs[0].finish_reason == "length"


def test_a_bug_in_one_text_fails_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = llm.generate(PROMPTS, greedy())
    bad = free[1].outputs[0].token_ids[2]
    others = [output.outputs[0].token_ids for output in (free[0], free[2])]
    assert not any(bad in ids for ids in others), "the prompts share a token; take others"
    decode_bytes = llm.tokenizer.decode_bytes

    def broken(ids: Sequence[int], **options: Any) -> bytes:
        if bad in ids:
            raise KeyError("a bug")
        return decode_bytes(ids, **options)

    monkeypatch.setattr(llm.tokenizer, "decode_bytes", broken)
    for streaming in (True, False):
        caplog.clear()
        with caplog.at_level(logging.ERROR, "minivllm"):
            if streaming:
                deltas = list(llm.stream(PROMPTS, greedy()))
                outputs = {delta.index: delta.output for delta in deltas if delta.output is not None}
            else:
                outputs = dict(enumerate(llm.generate(PROMPTS, greedy())))
        assert outputs[1].outputs[0].finish_reason == "error"
        assert [outputs[index].outputs[0].token_ids for index in (0, 2)] == others
        assert [outputs[index].text for index in (0, 2)] == [free[0].text, free[2].text]
        assert len([record for record in caplog.records if record.name == "minivllm"]) == 1
        assert "KeyError: 'a bug'" in caplog.text
    monkeypatch.undo()
    assert llm.generate(PROMPTS[1], greedy())[0].text == free[1].text
