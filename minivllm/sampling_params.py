"""How one request's tokens are drawn and when it ends.

`SamplingParams` is frozen and checked once, at construction, so that nothing behind it has to check again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from minivllm.errors import RequestError
from minivllm.options import check_bool, check_float, check_int, show, strict_keywords

MAX_STOP_TOKEN_IDS = 1024
_INT32_MAX = 2**31 - 1


@strict_keywords(RequestError)
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Options of one request; every one may be left out, and an unknown one raises RequestError.

    temperature: the logits are divided by it; 0 takes the most likely token (greedy). Finite, >= 0.
    top_p: keep the smallest set of tokens whose probabilities add up to top_p. In (0, 1]; 1 keeps all.
    top_k: keep the k most likely tokens. 0 keeps all; -1, another common spelling of that, becomes 0.
    min_p: keep the tokens at least min_p times as likely as the most likely one. In [0, 1]; 0 keeps all.
    max_tokens: generate at most so many tokens, >= 1; also bounded by the model's context length.
    seed: draws of this request repeat for the same seed; None takes one from the engine. In [-2**63, 2**63 - 1].
    stop_token_ids: tokens that end the request, besides the model's own end tokens; at most 1024, kept as a tuple.
    ignore_eos: go on past the model's own end tokens.

    Raises RequestError, naming the field, its value and its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 16
    seed: int | None = None
    stop_token_ids: Iterable[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._set("temperature", check_float("temperature", self.temperature, 0.0, math.inf, RequestError))
        self._set("top_p", check_float("top_p", self.top_p, 0.0, 1.0, RequestError, low_excluded=True))
        self._set("top_k", max(0, check_int("top_k", self.top_k, -1, _INT32_MAX, RequestError)))
        self._set("min_p", check_float("min_p", self.min_p, 0.0, 1.0, RequestError))
        self._set("max_tokens", check_int("max_tokens", self.max_tokens, 1, None, RequestError))
        if self.seed is not None:
            self._set("seed", check_int("seed", self.seed, -(2**63), 2**63 - 1, RequestError))
        self._set("stop_token_ids", _checked_stop_token_ids(self.stop_token_ids))
        check_bool("ignore_eos", self.ignore_eos, RequestError)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _checked_stop_token_ids(ids: Any) -> tuple[int, ...]:
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise RequestError(f"stop_token_ids is {show(ids)}; it must be an iterable of token ids, such as (1, 2)")
    first = list(islice(ids, MAX_STOP_TOKEN_IDS + 1))  # the bound holds for an endless iterable too
    if len(first) > MAX_STOP_TOKEN_IDS:
        raise RequestError(f"stop_token_ids has more than {MAX_STOP_TOKEN_IDS} ids; give fewer")
    return tuple(check_int(f"stop_token_ids[{i}]", token, 0, _INT32_MAX, RequestError) for i, token in enumerate(first))
