"""RequestReader: tokens become text, logprobs and the best samples; a bug on the way stays in its request."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from typing import Any

import pytest

from minivllm.batch import TokenLogprobs
from minivllm.hub import BUNDLED_MODEL
from minivllm.output import RequestReader, with_text
from minivllm.request import FinishReason, Logprob, Request
from minivllm.sampling_params import SamplingParams
from minivllm.text import Tokenizer
from tests.text.test_stop import expected


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(BUNDLED_MODEL)


def make(params: SamplingParams, prompt: Sequence[int] = (1, 2, 3)) -> list[Request]:
    leader: Request | None = None
    requests = []
    for index in range(params.num_samples):
        requests.append(
            Request(
                request_id="r",
                prompt_token_ids=list(prompt),
                params=params,
                max_tokens=params.max_tokens,
                stop_ids=frozenset(params.stop_token_ids),
                seed=0,
                index=index,
                leader=leader,
            )
        )
        leader = requests[0]
    return requests


def told(tokenizer: Tokenizer, params: SamplingParams, ids: Sequence[int], **ends: Any) -> tuple[str, RequestReader]:
    """The text of a request that got `ids` one by one and ended with the last, and its reader."""
    [request] = make(params)
    reader, text = RequestReader(tokenizer, None, params, [request]), ""
    for index, token in enumerate(ids):
        request.output_token_ids.append(token)
        if index == len(ids) - 1:
            request.finish_reason = ends.get("reason", FinishReason.LENGTH)
        text += reader.read(0).text
        if reader.finished:
            break
    return text, reader


def test_pieces_are_the_text(tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    half = next(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"\xc3")
    ids = [*rng.choices(range(tokenizer.vocab_size), k=50), min(tokenizer.special_ids), half]
    assert tokenizer.decode(ids).endswith("\ufffd")
    for skip in (True, False):
        text, reader = told(tokenizer, SamplingParams(skip_special_tokens=skip), ids)
        [output] = reader.output().outputs
        assert text == output.text == tokenizer.decode(ids, skip_special_tokens=skip)
        assert (output.token_ids, output.finish_reason, output.stop_reason) == (ids, "length", None)
        assert (output.logprobs, output.cumulative_logprob, reader.output().prompt_logprobs) == (None, None, None)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_end_the_text_and_the_tokens(tokenizer: Tokenizer, seed: int, include: bool) -> None:
    rng = random.Random(seed)
    ids = tokenizer.encode("Once upon a time there was a king who had \u00e9\U0001f600 three daughters.")
    whole, num_found = tokenizer.decode(ids), 0
    for _ in range(100):
        begin, length, min_tokens = rng.randrange(len(whole)), rng.randint(1, 8), rng.randint(0, len(ids))
        stops = [whole[begin : begin + length], "no such text"]
        params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=99)
        text, reader = told(tokenizer, params, ids)
        too_early = max(0, len(tokenizer.decode_bytes(ids[: max(min_tokens - 1, 0)]).decode(errors="ignore")))
        wanted, stop = expected(whole, stops, include, too_early)
        [output] = reader.output().outputs
        assert (text, output.text, output.stop_reason) == (wanted, wanted, stop)
        if stop is None:
            assert (output.finish_reason, output.token_ids) == ("length", ids)
        else:
            num_found += 1
            end = len(wanted) if include else len(wanted) + len(stop)
            done = [len(tokenizer.decode_bytes(ids[:n]).decode(errors="ignore")) >= end for n in range(len(ids) + 1)]
            assert output.finish_reason == "stop"
            assert output.token_ids == ids[: done.index(True)]
    assert num_found > 10


def test_a_sample_may_end_before_the_engine_knows(tokenizer: Tokenizer) -> None:
    params = SamplingParams(stop="king", max_tokens=99)
    [request] = make(params)
    reader = RequestReader(tokenizer, None, params, [request])
    request.output_token_ids += tokenizer.encode("the king said")  # more tokens at once than one
    piece = reader.read(0)
    assert (piece.text, piece.finish_reason) == ("the ", FinishReason.STOP)
    assert reader.finished
    assert tokenizer.decode(reader.output().outputs[0].token_ids) == "the king"


def test_a_stop_string_in_the_last_token_is_the_reason(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the king")
    _, reader = told(tokenizer, SamplingParams(stop="ing"), ids)
    [output] = reader.output().outputs
    assert (output.text, output.finish_reason, output.stop_reason) == ("the k", "stop", "ing")


def test_a_stop_string_may_come_with_the_end(tokenizer: Tokenizer) -> None:
    """Half a character becomes a replacement character only when no more tokens come."""
    half = next(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == b"\xc3")
    text, reader = told(tokenizer, SamplingParams(stop="\ufffd"), [300, half])
    [output] = reader.output().outputs
    assert (text, output.finish_reason, output.stop_reason) == (tokenizer.decode([300]), "stop", "\ufffd")


def test_text_held_back_comes_when_the_request_ends(tokenizer: Tokenizer) -> None:
    text, _ = told(tokenizer, SamplingParams(stop="kings"), tokenizer.encode("the king"))
    assert text == "the king"


def test_stop_tokens_are_told_and_end_tokens_of_the_model_are_not(tokenizer: Tokenizer) -> None:
    for reason, stop_ids, wanted in (
        (FinishReason.STOP, [7, 9], 9),
        (FinishReason.STOP, [7], None),
        (FinishReason.LENGTH, [7, 9], None),
    ):
        _, reader = told(tokenizer, SamplingParams(stop_token_ids=stop_ids), [300, 9], reason=reason)
        assert reader.output().outputs[0].stop_reason == wanted


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.TIMEOUT, FinishReason.ERROR])
def test_a_request_may_end_without_a_token(tokenizer: Tokenizer, reason: FinishReason) -> None:
    params = SamplingParams(stop="a", logprobs=1, prompt_logprobs=1, n=2)
    requests = make(params)
    reader = RequestReader(tokenizer, "text", params, requests)
    for index, request in enumerate(requests):
        assert reader.read(index).finish_reason is None
        request.finish_reason = reason
        assert reader.read(index) == ("", reason)
    output = reader.output()
    assert output.finished
    assert [one.finish_reason for one in output.outputs] == [reason.value] * 2
    assert [one.logprobs for one in output.outputs] == [[], []]


def test_logprobs_carry_the_text_of_their_tokens(tokenizer: Tokenizer) -> None:
    params = SamplingParams(logprobs=2, prompt_logprobs=1)
    [request] = make(params, prompt=[1, 2, 300])
    reader = RequestReader(tokenizer, "text", params, [request])
    assert reader.read(0).text == ""
    request.prompt_logprobs = [TokenLogprobs(2, -1.0, 2, ((5, -0.5),)), TokenLogprobs(300, -3.0, 9, ((301, -0.1),))]
    entries = [TokenLogprobs(400, -0.5, 1, ((400, -0.5), (401, -0.75))), TokenLogprobs(402, -9.0, 77, ((401, -0.25),))]
    for entry in entries:
        request.output_token_ids.append(entry.token_id)
        request.logprobs.append(entry)
        request.cumulative_logprob += entry.logprob
        reader.read(0)
    output = reader.output()
    text = {token: tokenizer.decode([token], skip_special_tokens=False) for token in (2, 5, 300, 301, 400, 401, 402)}
    assert output.prompt_logprobs == [
        None,
        {2: Logprob(-1.0, 2, text[2]), 5: Logprob(-0.5, 1, text[5])},
        {300: Logprob(-3.0, 9, text[300]), 301: Logprob(-0.1, 1, text[301])},
    ]
    assert output.outputs[0].logprobs == [
        {400: Logprob(-0.5, 1, text[400]), 401: Logprob(-0.75, 2, text[401])},
        {402: Logprob(-9.0, 77, text[402]), 401: Logprob(-0.25, 1, text[401])},
    ]
    assert output.outputs[0].cumulative_logprob == -9.5
    assert not output.finished


def test_ties_share_a_rank(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_ids)
    top = ((3, -0.5), (5, -1.0), (9, -1.0), (special, -1.0), (4, -2.0))
    named = with_text(tokenizer, TokenLogprobs(9, -1.0, 2, top))
    assert list(named) == [9, 3, 5, special, 4]
    assert [one.rank for one in named.values()] == [2, 1, 2, 2, 5]
    assert named[special].decoded_token == tokenizer.token_bytes(special).decode() != ""


def test_the_best_samples_come_first_and_only_if_there_are_more_than_wanted(tokenizer: Tokenizer) -> None:
    for n, best_of, places in ((2, 4, [2, 0]), (4, None, [0, 1, 2, 3]), (4, 4, [0, 1, 2, 3])):
        params = SamplingParams(n=n, best_of=best_of, max_tokens=1)
        requests = make(params)
        reader = RequestReader(tokenizer, None, params, requests)
        for request, logprob in zip(requests, (-2.0, -7.0, -1.0, -0.1), strict=True):
            request.output_token_ids.append(300 + request.index)
            request.cumulative_logprob = logprob
            request.finish_reason = FinishReason.ERROR if request.index == 3 else FinishReason.LENGTH
            reader.read(request.index)
        output = reader.output()
        assert [one.token_ids for one in output.outputs] == [[300 + place] for place in places]
        assert [one.index for one in output.outputs] == list(range(n))
        shown = [-1.0, -2.0] if best_of == 4 and n == 2 else [None] * n
        assert [one.cumulative_logprob for one in output.outputs] == shown
        assert [one.logprobs for one in output.outputs] == [None] * n


def test_metrics_and_cached_tokens_of_the_whole_request(tokenizer: Tokenizer) -> None:
    params = SamplingParams(n=3)
    requests = make(params)
    for index, request in enumerate(requests):
        request.arrival_time, request.first_token_time, request.finish_time = 1.0, 2.0 + index, 9.0 - index
        request.num_preemptions, request.num_cached_tokens = index, 16 * (3 - index)
    output = RequestReader(tokenizer, "p", params, requests).output()
    assert output.num_cached_tokens == 48
    metrics = output.metrics
    assert (metrics.first_token_time, metrics.finish_time, metrics.num_preemptions) == (2.0, 9.0, 3)
    requests[1].finish_time = None
    assert RequestReader(tokenizer, "p", params, requests).output().metrics.finish_time is None


class Broken:
    """A tokenizer with a bug that one id brings out."""

    def __init__(self, tokenizer: Tokenizer, bad: int) -> None:
        self._tokenizer, self._bad = tokenizer, bad

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return self.decode_bytes(ids, **options).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int], **options: Any) -> bytes:
        if self._bad in ids:
            raise ZeroDivisionError("a bug")
        return self._tokenizer.decode_bytes(ids, **options)


def test_a_bug_ends_its_sample_alone_and_is_logged(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(n=2, stop="zzz")
    requests = make(params)
    reader = RequestReader(Broken(tokenizer, 333), "p", params, requests)  # type: ignore[arg-type]
    with caplog.at_level(logging.ERROR, "minivllm"):
        for request, last in zip(requests, (333, 334), strict=True):
            request.output_token_ids += [300, 301, last]
            piece = reader.read(request.index)
            assert piece.finish_reason is (FinishReason.ERROR if last == 333 else None)
            assert piece.text == tokenizer.decode([300, 301] if last == 333 else [300, 301, 334])
    [record] = [record for record in caplog.records if record.name == "minivllm"]
    assert "request r cannot" in record.message
    assert record.exc_info is not None and record.exc_info[0] is ZeroDivisionError
    assert [one.finish_reason for one in reader.output().outputs] == ["error", None]


@pytest.mark.parametrize("place", ["logprobs", "prompt_logprobs"])
def test_a_bug_in_logprobs_too(tokenizer: Tokenizer, place: str, caplog: pytest.LogCaptureFixture) -> None:
    params = SamplingParams(logprobs=1, prompt_logprobs=1)
    [request] = make(params, prompt=[1, 2])
    request.prompt_logprobs = [TokenLogprobs(2, -1.0, 2, ((333 if place == "prompt_logprobs" else 5, -0.5),))]
    request.logprobs = [TokenLogprobs(300, -1.0, 2, ((333 if place == "logprobs" else 5, -0.5),))]
    request.output_token_ids.append(300)
    reader = RequestReader(Broken(tokenizer, 333), "p", params, [request])  # type: ignore[arg-type]
    assert reader.read(0).finish_reason is FinishReason.ERROR
    assert reader.output().outputs[0].finish_reason == "error"
    assert "ZeroDivisionError" in caplog.text
