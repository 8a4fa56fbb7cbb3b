"""Scores and embeddings from what the runner gives."""

from __future__ import annotations

import math

import pytest

from minivllm.batch import TokenLogprobs
from minivllm.scoring import make_embedding, make_score

ENTRIES = [TokenLogprobs(token, logprob, 1, ()) for token, logprob in ((5, -1.0), (6, -2.0), (7, -0.5))]


def test_a_score_is_about_the_tokens_at_the_end() -> None:
    whole = make_score([4, 5, 6, 7], ENTRIES, 3)
    assert whole.token_ids == [4, 5, 6, 7]
    assert whole.logprobs == [None, -1.0, -2.0, -0.5]
    assert whole.total == -3.5
    assert whole.perplexity == pytest.approx(math.exp(3.5 / 3))
    end = make_score([4, 5, 6, 7], ENTRIES, 1)
    assert (end.total, end.num_scored) == (-0.5, 1)
    assert end.perplexity == pytest.approx(math.exp(0.5))
    assert end.logprobs == whole.logprobs


def test_nothing_to_score_and_nothing_likely() -> None:
    alone = make_score([4], [], 0)
    assert (alone.logprobs, alone.total) == ([None], 0.0)
    assert math.isnan(alone.perplexity)
    assert make_score([4, 5], [TokenLogprobs(5, -1e6, 9, ())], 1).perplexity == math.inf
    assert make_score([4, 5], [TokenLogprobs(5, -math.inf, 9, ())], 1).perplexity == math.inf


def test_embeddings_have_length_1_where_that_is_asked_for() -> None:
    assert make_embedding([1], [3.0, -4.0], normalize=True).embedding == [0.6, -0.8]
    assert make_embedding([1], [3.0, -4.0], normalize=False).embedding == [3.0, -4.0]
    assert make_embedding([1], [0.0, 0.0], normalize=True).embedding == [0.0, 0.0]
