"""Request and its public results: what they start with, and what they show."""

from __future__ import annotations

import json

from minivllm.request import CompletionOutput, FinishReason, Request, RequestMetrics, RequestOutput
from minivllm.sampling_params import SamplingParams


def make(name: str) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=[1, 2, 3],
        params=SamplingParams(),
        max_tokens=16,
        stop_ids=frozenset({2}),
        seed=7,
    )


def test_a_new_request_has_computed_nothing() -> None:
    first, second = make("a"), make("b")
    first.output_token_ids.append(5)
    assert second.output_token_ids == []
    assert (second.num_scheduled, second.slot, second.finish_reason) == (0, None, None)


def test_requests_are_equal_only_to_themselves() -> None:
    assert make("a") != make("a")


def test_metrics_show_the_times_known_so_far() -> None:
    request = make("a")
    request.arrival_time = 1.5
    assert request.metrics == RequestMetrics(1.5, None, None)
    request.first_token_time, request.finish_time, request.num_preemptions = 2.0, 3.0, 2
    assert request.metrics == RequestMetrics(1.5, 2.0, 3.0, 2)


def test_a_label_names_the_sample_where_that_is_not_the_first() -> None:
    request = make("a")
    assert request.label == "a"
    request.index = 3
    assert request.label == "a/3"


def test_finish_reasons_are_their_strings() -> None:
    assert [reason.value for reason in FinishReason] == ["stop", "length", "abort", "timeout", "error"]
    assert FinishReason.STOP == "stop"
    assert json.dumps(FinishReason.LENGTH) == '"length"'


def test_text_is_that_of_the_first_output() -> None:
    outputs = [CompletionOutput(0, "one", [1], "stop"), CompletionOutput(1, "two", [2], None)]
    output = RequestOutput("a", "hi", [9], 0, outputs, False, RequestMetrics(0.0, None, None))
    assert output.text == "one"
