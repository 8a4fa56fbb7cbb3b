"""LLM: more prompts than the queue holds, urgent ones first, and what prompts find in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from minivllm import LLM, QueueFullError, RequestError, SamplingParams

SHORT = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """One that runs 2 sequences at once and lets 3 wait, by priority."""
    options = {"num_kv_blocks": 128, "max_num_seqs": 2, "max_num_waiting": 3, "scheduling_policy": "priority"}
    with LLM(device="cpu", **options) as llm:
        yield llm
        assert not llm.engine.has_unfinished
        assert llm.engine.block_manager.num_used == 0
        llm.engine.scheduler.check()


def test_a_list_may_be_longer_than_the_queue(llm: LLM) -> None:
    prompts = [[100 + index, 7] for index in range(15)]
    together = llm.generate(prompts, SHORT)
    assert [output.prompt_token_ids for output in together] == prompts
    alone = [llm.generate([prompt], SHORT)[0].outputs[0].token_ids for prompt in prompts]
    assert [output.outputs[0].token_ids for output in together] == alone


def test_more_samples_than_the_queue_holds(llm: LLM) -> None:
    params = SamplingParams(n=5, max_tokens=2, seed=1, ignore_eos=True)
    outputs = llm.generate(["A", "B", "C"], [params, SHORT, params])
    assert [len(output.outputs) for output in outputs] == [5, 1, 5]
    assert all(one.finish_reason == "length" for output in outputs for one in output.outputs)


def test_nothing_starts_where_one_prompt_is_bad(llm: LLM) -> None:
    steps = llm.engine.block_manager.stats.prompt_tokens
    with pytest.raises(RequestError, match=r"prompt_token_ids\[1\] is -1"):
        llm.generate([*([[1, 2]] * 10), [1, -1]], SHORT)
    assert not llm.engine.has_unfinished
    assert llm.engine.block_manager.stats.prompt_tokens == steps


def test_streams_go_on_while_others_wait_for_room(llm: LLM) -> None:
    open_stream = llm.stream(["One", "Two"], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    texts = ["", ""]
    first = next(open_stream)
    texts[first.index] += first.text
    many = llm.stream([[index] for index in range(300, 310)], SHORT)
    num_ended = 0
    for _ in range(6):
        num_ended += next(many).finish_reason is not None
        delta = next(open_stream)
        texts[delta.index] += delta.text
    for delta in open_stream:
        texts[delta.index] += delta.text
    num_ended += sum(delta.finish_reason is not None for delta in many)
    assert num_ended == 10
    expected = llm.generate(["One", "Two"], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    assert texts == [output.text for output in expected]


def test_a_full_queue_is_no_error_of_the_llm(llm: LLM) -> None:
    """Whoever talks to the engine directly is told; the LLM waits, also behind requests that are not its own."""
    for index in range(3):
        llm.engine.add_request(f"mine-{index}", [5, 6], SHORT)
    with pytest.raises(QueueFullError, match="3 requests wait"):
        llm.engine.add_request("one too many", [5, 6], SHORT)
    assert llm.generate("Hello", SHORT)[0].finished
    while llm.engine.has_unfinished:
        llm.engine.step()


def test_leaving_early_drops_what_never_started(llm: LLM) -> None:
    stream = llm.stream([[index] for index in range(300, 320)], SHORT)
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished
    assert llm.engine.num_waiting == 0


def test_the_urgent_go_first(llm: LLM) -> None:
    order = []
    for delta in llm.stream(["A", "B", "C", "D"], SHORT, priority=[0, 5, -5, 0]):
        if delta.output is not None:
            order.append(delta.index)
    assert order == [2, 0, 3, 1]


def test_salts_part_the_cache_and_clearing_empties_it(llm: LLM) -> None:
    ids = list(range(1000, 1040))
    llm.clear_prefix_cache()

    def cached(salt: str | None) -> int:
        return llm.generate({"prompt_token_ids": ids, "cache_salt": salt}, SHORT)[0].num_cached_tokens

    assert [cached("a"), cached("a"), cached("b"), cached(None), cached("b")] == [0, 32, 0, 0, 32]
    llm.clear_prefix_cache()
    assert [cached("a"), cached(None)] == [0, 0]
