"""What a model makes of a given text: how likely it is (`Score`) and where it lies in meaning (`Embedding`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minivllm.batch import TokenLogprobs


@dataclass(frozen=True)
class Score:
    """How likely a sequence of tokens is, given those before each.

    token_ids: of the prompt, and of the continuation where there was one.
    logprobs: natural logarithm of each token's probability; None for the first, which nothing comes before.
    num_scored: how many tokens at the end `total` is about: the continuation's, or else all but the first.
    total: the sum of their logprobs.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    num_scored: int
    total: float

    @property
    def perplexity(self) -> float:
        """exp of the mean of -logprob over the scored tokens: between how many tokens the model hesitates; nan where no
        token was scored."""
        if not self.num_scored:
            return math.nan
        try:
            return math.exp(-self.total / self.num_scored)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Embedding:
    """A text as a direction in the model's space of hidden states: embedding has hidden_size floats."""

    token_ids: list[int]
    embedding: list[float]


def make_score(token_ids: Sequence[int], entries: Sequence[TokenLogprobs], num_scored: int) -> Score:
    """entries: the logprobs of all tokens but the first."""
    logprobs = [entry.logprob for entry in entries]
    total = math.fsum(logprobs[len(logprobs) - num_scored :])
    return Score(list(token_ids), [None, *logprobs], num_scored, total)


def make_embedding(token_ids: Sequence[int], vector: Sequence[float] | None, normalize: bool) -> Embedding:
    """normalize: make its Euclidean length 1, so that the dot product of two of them is their cosine similarity."""
    assert vector is not None, "a request with pooling ended well without an embedding"
    length = math.hypot(*vector) if normalize else 1.0
    return Embedding(list(token_ids), [value / length for value in vector] if length else list(vector))
