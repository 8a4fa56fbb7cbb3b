"""Checks shared by everything that takes options from a caller: unknown names, integers and numbers out of range.

Each check returns the plain Python value or raises the caller's kind of error with the name, the value, the limit and
the fix, so that a message is worded in one place only.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

from minivllm.errors import MiniVLLMError

T = TypeVar("T")


def show(value: object) -> str:
    """`repr(value)`, cut to 80 characters, so that a hostile value cannot flood a message or a log."""
    try:
        text = repr(value)
    except ValueError:  # CPython refuses to print integers of more than 4300 digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def reject_unknown(names: Iterable[str], allowed: Collection[str], what: str, error: type[MiniVLLMError]) -> None:
    """Raise `error` for the first of `names` that is not in `allowed`, with the nearest allowed name as a hint."""
    for name in names:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(allowed)}"
            raise error(f"{what} has no option {show(name)}; {hint}")


def strict_keywords(error: type[MiniVLLMError]) -> Callable[[type[T]], type[T]]:
    """Class decorator for a keyword-only dataclass: an unknown keyword raises `error` instead of TypeError."""

    def decorate(cls: type[T]) -> type[T]:
        generated: Callable[..., None] = cls.__init__
        allowed = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]

        @functools.wraps(generated)
        def checked(self: T, **options: Any) -> None:
            reject_unknown(options, allowed, cls.__name__, error)
            generated(self, **options)

        cls.__init__ = checked  # type: ignore[assignment]
        return cls

    return decorate


def check_int(name: str, value: Any, low: int, high: int | None, error: type[MiniVLLMError]) -> int:
    """`value` as an int in [low, high] (no upper limit where high is None); booleans and floats are no integers."""
    limit = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        raise error(f"{name} is {show(value)}; it must be {limit}")
    return number


def check_float(
    name: str,
    value: Any,
    low: float,
    high: float,
    error: type[MiniVLLMError],
    *,
    low_excluded: bool = False,
) -> float:
    """`value` as a finite float in [low, high], or in (low, high] where `low_excluded`; booleans are no numbers."""
    sign = ">" if low_excluded else ">="
    limit = f"a finite number {sign} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond the range of a float
            number = math.inf
    inside = low < number <= high if low_excluded else low <= number <= high
    if not (inside and math.isfinite(number)):
        raise error(f"{name} is {show(value)}; it must be {limit}")
    return number


def check_bool(name: str, value: Any, error: type[MiniVLLMError]) -> bool:
    """`value` if it is True or False; 0, 1 and strings are refused."""
    if not isinstance(value, bool):
        raise error(f"{name} is {show(value)}; it must be True or False")
    return value


def check_choice(name: str, value: Any, choices: Collection[str], error: type[MiniVLLMError]) -> str:
    """`value` if it is one of the strings `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise error(f"{name} is {show(value)}; it must be one of {', '.join(map(repr, choices))}")
    return value
