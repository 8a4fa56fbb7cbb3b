"""How one request's tokens are drawn, when it ends, and what is told of it.

`SamplingParams` is frozen and checked once, at construction, so that nothing behind it has to check again. Every
container is copied into a tuple of bounded length, so that no caller can make the engine hold more than it means to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from minivllm.errors import RequestError
from minivllm.options import check_bool, check_float, check_int, show, strict_keywords

MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIASES = 1024
MAX_ALLOWED_TOKEN_IDS = 1 << 20
MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1000
MAX_BAD_WORDS = 512
"""Most lists of ids; a string counts as two of them, as it is looked for with and without a space in front."""
MAX_BAD_WORD_CHARACTERS = 250
MAX_BAD_WORD_IDS = 1024
"""Tokens of one bad word; more than 250 characters and a space have bytes."""
MAX_SAMPLES = 128
MAX_LOGPROBS = 128
_INT32_MAX = 2**31 - 1


@strict_keywords(RequestError)
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Options of one request; every one may be left out, and an unknown one raises RequestError.

    How a token is drawn; what changes the logits does so in this order:

    repetition_penalty: the logits of tokens in the prompt or the output are divided by it where positive, multiplied
        where negative. In [0.01, 100]; 1 changes nothing.
    frequency_penalty: is subtracted from a token's logit as often as the token was generated. In [-2, 2].
    presence_penalty: is subtracted once where the token was generated at all. In [-2, 2].
    logit_bias: {token id: what is added to its logit}, in [-100, 100]; ids may be strings of digits, as in JSON. At
        most 1024; kept as a sorted tuple of pairs.
    allowed_token_ids: only these are ever drawn; at most 2**20, kept as a sorted tuple. None allows all.
    bad_words: strings or lists of token ids that are never completed; a string is looked for with and without a space
        in front. At most 256 strings of 250 characters, or 512 lists of 1024 ids.
    temperature: the logits are divided by it; 0 takes the most likely token (greedy). Finite, >= 0.
    top_k: keep the k most likely tokens. 0 keeps all; -1, another common spelling of that, becomes 0.
    top_p: keep the smallest set of tokens whose probabilities add up to top_p. In (0, 1]; 1 keeps all.
    min_p: keep the tokens at least min_p times as likely as the most likely one. In [0, 1]; 0 keeps all.
    seed: draws of this request repeat for the same seed; None takes one from the engine. In [-2**63, 2**63 - 1].

    When it ends:

    max_tokens: generate at most so many tokens, >= 1; also bounded by the model's context length.
    min_tokens: generate at least so many tokens before an end token, a stop token or a stop string may end it. In
        [0, max_tokens].
    stop: strings, or one, that end the text where the first of them is complete; at most 64 of 1000 characters.
    include_stop_str_in_output: let the text end behind the stop string instead of before it.
    stop_token_ids: tokens that end the request, besides the model's own end tokens; at most 1024, kept as a tuple.
    ignore_eos: go on past the model's own end tokens.
    timeout: seconds after its arrival at which it ends with what it has; None: never. Finite, > 0.

    What comes back:

    n: number of continuations, drawn in parallel. In [1, 128].
    best_of: draw so many and return the n of the largest cumulative logprob. In [n, 128]; None draws n.
    logprobs: tell the logprob of each drawn token and of so many of the likeliest. In [0, 128]; None tells nothing.
    prompt_logprobs: the same for the prompt's tokens.
    skip_special_tokens: leave the text of special tokens out.
    truncate_prompt_tokens: keep only the last so many tokens of the prompt, >= 1; None keeps all.

    For containers None is another spelling of empty, and what they are given as may be any iterable.

    Raises RequestError, naming the field, its value and its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    # Any: these take more types than the one they keep.
    logit_bias: Any = ()  # kept as tuple[tuple[int, float], ...]
    allowed_token_ids: Any = None  # kept as tuple[int, ...] | None
    bad_words: Any = ()  # kept as tuple[str | tuple[int, ...], ...]
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: Any = ()  # kept as tuple[str, ...]
    include_stop_str_in_output: bool = False
    stop_token_ids: Any = ()  # kept as tuple[int, ...]
    ignore_eos: bool = False
    timeout: float | None = None
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_counts()
        self._set("logit_bias", _checked_biases(self.logit_bias))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", _checked_allowed_ids(self.allowed_token_ids))
        self._set("bad_words", _checked_bad_words(self.bad_words))
        self._set("stop", _checked_stop_strings(self.stop))
        self._set("stop_token_ids", _checked_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            check_bool(name, getattr(self, name), RequestError)

    @property
    def num_samples(self) -> int:
        """How many continuations are drawn."""
        return self.n if self.best_of is None else self.best_of

    def _check_numbers(self) -> None:
        self._check_float("temperature", 0.0, math.inf)
        self._check_float("top_p", 0.0, 1.0, low_excluded=True)
        self._check_float("min_p", 0.0, 1.0)
        self._check_float("presence_penalty", -2.0, 2.0)
        self._check_float("frequency_penalty", -2.0, 2.0)
        self._check_float("repetition_penalty", 0.01, 100.0)
        if self.timeout is not None:
            self._check_float("timeout", 0.0, math.inf, low_excluded=True)

    def _check_counts(self) -> None:
        self._check_int("top_k", -1, _INT32_MAX)
        self._set("top_k", max(0, self.top_k))
        self._check_int("max_tokens", 1, None)
        self._check_int("min_tokens", 0, self.max_tokens, " (max_tokens)")
        self._check_int("n", 1, MAX_SAMPLES)
        optional = (
            ("seed", -(2**63), 2**63 - 1, ""),
            ("best_of", self.n, MAX_SAMPLES, f" (n is {self.n})"),
            ("logprobs", 0, MAX_LOGPROBS, ""),
            ("prompt_logprobs", 0, MAX_LOGPROBS, ""),
            ("truncate_prompt_tokens", 1, None, ""),
        )
        for name, low, high, why in optional:
            if getattr(self, name) is not None:
                self._check_int(name, low, high, why)

    def _check_int(self, name: str, low: int, high: int | None, why: str = "") -> None:
        try:
            self._set(name, check_int(name, getattr(self, name), low, high, RequestError))
        except RequestError as error:
            raise RequestError(f"{error}{why}") from None

    def _check_float(self, name: str, low: float, high: float, *, low_excluded: bool = False) -> None:
        self._set(name, check_float(name, getattr(self, name), low, high, RequestError, low_excluded=low_excluded))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _listed(name: str, value: Any, most: int, what: str) -> list[Any]:
    """The entries of a container, at most `most`: the bound holds for an endless iterable too. None has none."""
    if value is None:
        return []
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(f"{name} is {show(value)}; it must be a list of {what}")
    entries = list(islice(value, most + 1))
    if len(entries) > most:
        raise RequestError(f"{name} has more than {most} entries; give at most {most} {what}")
    return entries


def _checked_ids(name: str, value: Any, most: int) -> tuple[int, ...]:
    ids = _listed(name, value, most, "token ids")
    if ids and all(type(token) is int for token in ids) and min(ids) >= 0 and max(ids) <= _INT32_MAX:
        return tuple(ids)  # the quick way to what the next line gives
    return tuple(check_int(f"{name}[{index}]", token, 0, _INT32_MAX, RequestError) for index, token in enumerate(ids))


def _checked_allowed_ids(value: Any) -> tuple[int, ...]:
    ids = _checked_ids("allowed_token_ids", value, MAX_ALLOWED_TOKEN_IDS)
    if not ids:
        raise RequestError("allowed_token_ids is empty, so nothing could be drawn; give at least one id, or None")
    return tuple(sorted(set(ids)))


def _checked_biases(value: Any) -> tuple[tuple[int, float], ...]:
    what = "pairs of a token id and a number, or a dict of them"
    biases: dict[int, float] = {}
    for pair in _listed("logit_bias", value.items() if isinstance(value, Mapping) else value, MAX_LOGIT_BIASES, what):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise RequestError(f"logit_bias has the entry {show(pair)}; it must have {what}")
        token, bias = pair
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 10:
            token = int(token)
        token = check_int("logit_bias's token id", token, 0, _INT32_MAX, RequestError)
        if token in biases:
            raise RequestError(f"logit_bias names token {token} twice; give it one number")
        biases[token] = check_float(f"logit_bias[{token}]", bias, -100.0, 100.0, RequestError)
    return tuple(sorted(biases.items()))


def _checked_bad_words(value: Any) -> tuple[str | tuple[int, ...], ...]:
    words: list[str | tuple[int, ...]] = []
    for index, word in enumerate(_listed("bad_words", value, MAX_BAD_WORDS, "strings or lists of token ids")):
        name = f"bad_words[{index}]"
        if isinstance(word, str):
            words.append(_checked_text(name, word, MAX_BAD_WORD_CHARACTERS))
            continue
        ids = _checked_ids(name, word, MAX_BAD_WORD_IDS)
        if word is None or not ids:
            raise RequestError(f"{name} is {show(word)}; it must have at least one token")
        words.append(ids)
    if len(words) + sum(isinstance(word, str) for word in words) > MAX_BAD_WORDS:
        raise RequestError(f"bad_words has too many strings; give at most {MAX_BAD_WORDS // 2}")
    return tuple(words)


def _checked_stop_strings(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else _listed("stop", value, MAX_STOP_STRINGS, "strings")
    names = ["stop"] if isinstance(value, str) else [f"stop[{index}]" for index in range(len(strings))]
    return tuple(_checked_text(name, text, MAX_STOP_CHARACTERS) for name, text in zip(names, strings, strict=True))


def _checked_text(name: str, text: Any, most: int) -> str:
    if not isinstance(text, str) or not text:
        raise RequestError(f"{name} is {show(text)}; it must be a str of at least one character")
    if len(text) > most:
        raise RequestError(f"{name} is {show(text)} of {len(text)} characters; it may have at most {most}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise RequestError(f"{name} is {show(text)}, with a lone surrogate; it must consist of whole characters")
    return text
