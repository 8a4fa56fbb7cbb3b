"""Who asks what and when: traces and synthetic load as one stream of arrivals in order of time.

A prompt is a list of runs (token id, how often), made of numbers that are drawn once each: two prompts begin with the
same runs exactly where the workload says that they share a prefix. Every generated token but perhaps the last is
`ANSWER_TOKEN`, so answers are runs too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, cycle
from typing import NamedTuple, Protocol

from minivllm.errors import ConfigError
from minivllm.options import check_choice, check_float, check_int, show

ANSWER_TOKEN = 1
FIRST_PROMPT_TOKEN = 2
MOST_PRIORITIES = 256  # 0 .. 255: results keep one byte a request

Run = tuple[int, int]  # (token id, how often it stands there)
Draw = Callable[[random.Random], int]


class Turn(NamedTuple):
    """What a chat says after an answer: `prompt` new tokens, `think` seconds after it; `answer` tokens come back."""

    prompt: int
    answer: int
    think: float


@dataclass(slots=True)
class Arrival:
    """One request: at `time` seconds, the tokens of `runs`, exactly `answer` tokens to generate.

    later: the turns of the chat that follow, the next one last. token: what the new text of a later turn consists of.
    """

    time: float
    runs: list[Run]
    answer: int
    priority: int = 0
    later: list[Turn] | None = None
    token: int = 0

    def prompt_token_ids(self) -> list[int]:
        """The prompt itself."""
        ids: list[int] = []
        for token, times in self.runs:
            ids += [token] * times
        return ids

    def next_turn(self, ended: float, answer: list[int]) -> Arrival | None:
        """The chat's next request, given when this one ended and with what answer: prompt, answer, new text."""
        if not self.later:
            return None
        *later, turn = self.later
        runs = [*self.runs, (ANSWER_TOKEN, len(answer) - 1), (answer[-1], 1), (self.token, turn.prompt)]
        return Arrival(ended + turn.think, runs, turn.answer, self.priority, later, self.token)


class Workload(Protocol):
    """Anything that can be simulated, more than once."""

    @property
    def total(self) -> int:
        """Requests in all, later turns of chats included."""

    def arrivals(self) -> Iterator[Arrival]:
        """The first turns, in order of time; each call gives the same ones, which nobody changes."""


def parse_lengths(name: str, text: str) -> Draw:
    """How a length is drawn: "100", "uniform:LOW:HIGH", "exponential:MEAN" or "lognormal:MEDIAN:SIGMA"; always >= 1.

    Raises ConfigError for an unknown form or a number out of range.
    """
    kind, *arguments = ["constant", text] if text[:1].isdigit() else text.split(":")
    forms = {"constant": 1, "uniform": 2, "exponential": 1, "lognormal": 2}
    check_choice(name, kind, forms, ConfigError)
    try:
        numbers = [float(argument) for argument in arguments]
    except ValueError:
        numbers = []
    if len(numbers) != forms[kind] or not all(0 < number < 1e9 for number in numbers):
        raise ConfigError(f"{name} is {show(text)}; {kind} takes {forms[kind]} positive numbers below 1e9")
    first, last = numbers[0], numbers[-1]
    if kind == "uniform" and last < first:
        raise ConfigError(f"{name} is {show(text)}; the lower end of a range comes first")
    draws: dict[str, Callable[[random.Random], float]] = {
        "constant": lambda rng: first,
        "uniform": lambda rng: rng.randint(int(first), int(last)),
        "exponential": lambda rng: math.ceil(rng.expovariate(1 / first)),
        "lognormal": lambda rng: rng.lognormvariate(math.log(first), last),
    }
    draw = draws[kind]
    return lambda rng: max(1, round(draw(rng)))


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Random load that repeats for the same seed.

    total: requests, turns of chats counted one by one. rate: chats a second, arriving as a Poisson process; None: all
    at the start. prompt, answer: how lengths are drawn; prompt is what a turn says anew. shared_prefix: tokens that
    open every chat, one of `groups` such openings, in turn. turns: requests a chat. think: mean seconds between an
    answer and the next turn, exponentially distributed. priorities: each chat gets one of 0 .. priorities - 1.
    """

    total: int
    prompt: Draw
    answer: Draw
    rate: float | None = None
    shared_prefix: int = 0
    groups: int = 1
    turns: int = 1
    think: float = 0.0
    priorities: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("total", 1), ("shared_prefix", 0), ("groups", 1), ("turns", 1)):
            check_int(name, getattr(self, name), low, None, ConfigError)
        check_int("priorities", self.priorities, 1, MOST_PRIORITIES, ConfigError)
        check_float("think", self.think, 0.0, math.inf, ConfigError)
        if self.rate is not None:
            check_float("rate", self.rate, 0.0, math.inf, ConfigError, low_excluded=True)

    def arrivals(self) -> Iterator[Arrival]:
        """The first turn of each chat."""
        rng, time, left = random.Random(self.seed), 0.0, self.total
        openings = cycle(range(FIRST_PROMPT_TOKEN, FIRST_PROMPT_TOKEN + self.groups))
        for token in count(FIRST_PROMPT_TOKEN + self.groups):
            if not left:
                return
            time += rng.expovariate(self.rate) if self.rate else 0.0
            shared = [(next(openings), self.shared_prefix)] if self.shared_prefix else []
            first, *later = (self._turn(rng) for _ in range(min(left, self.turns)))
            left -= 1 + len(later)
            runs = [*shared, (token, first.prompt)]
            yield Arrival(time, runs, first.answer, rng.randrange(self.priorities), later[::-1], token)

    def _turn(self, rng: random.Random) -> Turn:
        think = rng.expovariate(1 / self.think) if self.think else 0.0
        return Turn(self.prompt(rng), self.answer(rng), think)


@dataclass(frozen=True, kw_only=True)
class Given:
    """Requests listed beforehand, such as the rows of a trace, in order of time."""

    listed: list[Arrival]

    @property
    def total(self) -> int:
        """Their number."""
        return len(self.listed)

    def arrivals(self) -> Iterator[Arrival]:
        """All of them."""
        return iter(self.listed)
