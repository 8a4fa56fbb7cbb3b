"""The public API on the bundled model, on the CPU."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from minivllm import LLM, ConfigError, EngineDeadError, RequestError, SamplingParams
from minivllm.hub import BUNDLED_MODEL

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(device="cpu", num_kv_blocks=256, max_num_seqs=8) as llm:
        yield llm
        assert not llm.engine.has_unfinished
        assert llm.engine.block_manager.num_used == 0
        llm.engine.scheduler.check()


def test_generate_gives_everything_a_caller_needs(llm: LLM) -> None:
    [output] = llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True))
    assert output.prompt == "Once upon a time"
    assert output.prompt_token_ids == llm.tokenizer.encode("Once upon a time")
    assert output.finished
    assert output.num_cached_tokens == 0
    [completion] = output.outputs
    assert len(completion.token_ids) == 20
    assert completion.finish_reason == "length"
    assert output.text == completion.text == llm.tokenizer.decode(completion.token_ids)
    metrics = output.metrics
    assert metrics.first_token_time is not None
    assert metrics.finish_time is not None
    assert metrics.arrival_time < metrics.first_token_time < metrics.finish_time


def test_every_spelling_of_a_prompt_is_the_same_prompt(llm: LLM) -> None:
    text = "The old king"
    ids = llm.tokenizer.encode(text)
    spellings = [text, ids, {"prompt_token_ids": ids}, {"prompt": text}, {"prompt": text, "prompt_token_ids": ids}]
    outputs = llm.generate(spellings, GREEDY)
    assert len(outputs) == len(spellings)
    assert {output.text for output in outputs} == {llm.generate(text, GREEDY)[0].text}
    assert llm.generate(ids, GREEDY)[0].text == llm.generate((text,), GREEDY)[0].text == outputs[0].text


def test_batch_order_and_neighbours_change_nothing_at_temperature_0(llm: LLM, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [rng.choices(range(4000), k=rng.randint(1, 40)) for _ in range(20)]  # more than max_num_seqs
    alone = [llm.generate(prompt, GREEDY)[0].outputs[0].token_ids for prompt in prompts]
    together = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    assert together == alone
    order = rng.sample(range(20), 20)
    shuffled = llm.generate([prompts[i] for i in order], GREEDY)
    assert [output.outputs[0].token_ids for output in shuffled] == [alone[i] for i in order]


def test_a_seed_draws_the_same_text_in_any_batch(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, max_tokens=16, seed=-7, ignore_eos=True)
    alone = llm.generate("My dear sister", params)[0].text
    other = SamplingParams(temperature=1.5, max_tokens=9, seed=3, ignore_eos=True)
    batch = llm.generate(["A", "My dear sister", "The sea was"], [other, params, other])
    assert batch[1].text == alone
    without = [llm.generate("My dear sister", SamplingParams(max_tokens=16, ignore_eos=True))[0].text for _ in range(3)]
    assert len({*without, alone}) > 1


def test_stop_token_ids_end_a_request(llm: LLM) -> None:
    free = llm.generate("Once upon a time", GREEDY)[0].outputs[0]
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=[stop])
    stopped = llm.generate("Once upon a time", params)[0].outputs[0]
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"


def test_chat_answers_and_ends_by_itself(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64)
    conversation = [{"role": "user", "content": "What is 12 plus 30?"}]
    [single] = llm.chat(conversation, params)
    assert single.outputs[0].finish_reason == "stop"
    assert single.text.strip()
    both = llm.chat([conversation, [{"role": "system", "content": "Be brief."}, *conversation]], params)
    assert both[0].text == single.text


def test_streamed_pieces_are_the_whole_text(llm: LLM) -> None:
    prompts = ["Once upon a time", "The sea was"]
    texts = ["", ""]
    finals = [None, None]
    for delta in llm.stream(prompts, GREEDY):
        assert finals[delta.index] is None, "a piece after the result"
        texts[delta.index] += delta.text
        finals[delta.index] = delta.output  # type: ignore[call-overload]
    assert texts == [output.text for output in llm.generate(prompts, GREEDY)]
    assert [final.text for final in finals] == texts  # type: ignore[attr-defined]


def test_two_open_streams_do_not_lose_each_others_tokens(llm: LLM) -> None:
    expected = [llm.generate(prompt, GREEDY)[0].text for prompt in ("A cat", "A dog")]
    streams = [llm.stream(prompt, GREEDY) for prompt in ("A cat", "A dog")]
    texts = ["", ""]
    open_ = {0, 1}
    while open_:
        for i in sorted(open_):
            delta = next(streams[i], None)
            if delta is None:
                open_.discard(i)
            else:
                texts[i] += delta.text
    assert texts == expected


def test_leaving_a_stream_aborts_it(llm: LLM) -> None:
    for _ in llm.stream(["Once", "twice"], SamplingParams(max_tokens=500, ignore_eos=True)):
        break
    assert not llm.engine.has_unfinished
    assert llm.engine.block_manager.num_used == 0


def test_an_abort_through_the_engine_ends_the_call_with_what_there_is(llm: LLM) -> None:
    stream = llm.stream(["Once", "twice"], SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    first = next(stream)
    [name] = [name for name, run in llm._loop._runs.items() if run.job.index == first.index]
    assert llm.engine.abort(name)
    finals = {delta.index: delta.output for delta in stream if delta.output is not None}
    aborted, other = finals[first.index], finals[1 - first.index]
    assert aborted.outputs[0].finish_reason == "abort"
    assert aborted.text.startswith(first.text)
    assert len(other.outputs[0].token_ids) == 30


BAD_PROMPTS = {
    "empty text": ("", "is empty"),
    "empty list": ([], "prompts is an empty list"),
    "empty ids": ({"prompt_token_ids": []}, "is empty"),
    "empty among others": (["a", ""], r"prompts\[1\] is empty"),
    "negative id": ([[1, -1]], r"prompt_token_ids\[1\] is -1; it must be an integer from 0 to 4095"),
    "id beyond the vocabulary": ([[4096]], "prompt_token_ids\\[0\\] is 4096"),
    "bool id": ([[True]], "is True"),
    "text id": ([["a"]], "is 'a'"),
    "number": (3, "prompts is 3; it must be a str"),
    "bytes": (b"abc", "prompts is b'abc'"),
    "None inside": ([None], r"prompts\[0\] is None"),
    "unknown key": ({"text": "a"}, "keys \\['text'\\]"),
    "bad salt": ({"prompt": "a", "cache_salt": 5}, "'cache_salt'] is 5"),
    "too long": ([[1] * 1024], "the prompt of request .* has 1024 tokens"),
    "lone surrogate": ("a\ud800", "surrogate"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_a_bad_prompt_is_named_and_nothing_is_lost(llm: LLM, case: str) -> None:
    prompt, message = BAD_PROMPTS[case]
    with pytest.raises(RequestError, match=message):
        llm.generate(prompt, GREEDY)
    assert not llm.engine.has_unfinished
    assert llm.generate("Once", GREEDY)[0].finished


def test_streams_and_conversations_are_checked_before_they_start(llm: LLM) -> None:
    for start in (llm.stream, llm.generate):
        with pytest.raises(RequestError, match=r"prompt_token_ids\[0\] is 4096"):
            start([[1], [4096]], GREEDY)
    with pytest.raises(RequestError, match="allowed_token_ids\\[0\\] is 4096"):
        llm.stream_chat([{"role": "user", "content": "hello"}], SamplingParams(allowed_token_ids=[4096]))
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize("bad", ["1", 1.5, None, True, 2**31])
def test_bad_priorities(llm: LLM, bad: object) -> None:
    for priority in (bad, [0, bad]):
        with pytest.raises(RequestError, match=r"^priority is"):
            llm.generate(["a", "b"], GREEDY, priority=priority)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="priority has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], GREEDY, priority=[1])


def test_bad_sampling_params_lists(llm: LLM) -> None:
    with pytest.raises(RequestError, match="2 entries for 1 prompts"):
        llm.generate("a", [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="must be a SamplingParams"):
        llm.generate("a", {"temperature": 0})  # type: ignore[arg-type]


def test_a_request_beyond_the_cache_is_refused_with_what_would_fit() -> None:
    with LLM(device="cpu", num_kv_blocks=4, max_num_seqs=2) as small:
        with pytest.raises(RequestError, match="at most 65 together fit"):
            small.generate([[1] * 60], SamplingParams(max_tokens=10))
        assert (
            len(small.generate([[1] * 60], SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0].token_ids) == 5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"devise": "cpu"}, "did you mean 'device'"),
        ({"device": "cuda:99"}, "asks for GPU 99"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"max_model_len": 5000}, "max_model_len is 5000"),
        ({"tensor_parallel_size": 2}, "later version"),
        ({"enforce_eager": True}, "later version"),
        ({"model": "no/such/folder"}, "there is no model folder 'no/such/folder'"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(**options)  # type: ignore[arg-type]


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    changed = {**config, "vocab_size": 4000, "eos_token_id": 1, "bos_token_id": None}
    (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
    (tmp_path / "model" / "generation_config.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer in .* has 4096 ids, but the model's vocabulary is 4000"):
        LLM(tmp_path / "model", device="cpu", load_format="dummy", num_kv_blocks=64)


def test_a_closed_llm_says_so() -> None:
    llm = LLM(device="cpu", num_kv_blocks=64)
    llm.close()
    llm.close()
    for use in (
        lambda: llm.generate("a", GREEDY),
        lambda: llm.stream("a", GREEDY),
        lambda: llm.score("a"),
        lambda: llm.encode("a"),
        lambda: llm.beam_search("a"),
        llm.clear_prefix_cache,
    ):
        with pytest.raises(EngineDeadError, match="was closed"):
            use()


def test_closing_ends_open_streams() -> None:
    llm = LLM(device="cpu", num_kv_blocks=64)
    stream = llm.stream("a", GREEDY)
    next(stream)
    llm.close()
    with pytest.raises(EngineDeadError, match="was closed"):
        list(stream)
