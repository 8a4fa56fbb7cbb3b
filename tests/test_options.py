"""The shared checks: what passes comes back as a plain value, what does not is named with its limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest

from minivllm.errors import ConfigError, RequestError
from minivllm.options import (
    check_bool,
    check_choice,
    check_float,
    check_int,
    reject_unknown,
    show,
    strict_keywords,
)


@strict_keywords(ConfigError)
@dataclass(frozen=True, kw_only=True)
class Kettle:
    litres: float = 1.0
    whistle: bool = True


def test_strict_keywords_names_the_nearest_option() -> None:
    assert Kettle(litres=2.0).litres == 2.0
    with pytest.raises(ConfigError, match="Kettle has no option 'liters'; did you mean 'litres'"):
        Kettle(liters=2.0)
    with pytest.raises(ConfigError, match="'colour'; it takes litres, whistle"):
        Kettle(colour="red")


def test_reject_unknown_uses_the_callers_error() -> None:
    reject_unknown(["a"], ["a", "b"], "thing", RequestError)
    with pytest.raises(RequestError, match="thing has no option 'zz'"):
        reject_unknown(["a", "zz"], ["a", "b"], "thing", RequestError)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_check_int_gives_plain_ints(value: object) -> None:
    number = check_int("n", value, 0, 9, ConfigError)
    assert number == 3
    assert type(number) is int


@pytest.mark.parametrize("value", [True, 3.0, "3", None, -1, 10, 10**400, [3], np.float64(3)])
def test_check_int_refuses(value: object) -> None:
    with pytest.raises(ConfigError, match=r"n is .*; it must be an integer from 0 to 9"):
        check_int("n", value, 0, 9, ConfigError)


@pytest.mark.parametrize("value", [1, 0.25, np.float32(0.25), np.float64(1), Fraction(1, 4)])
def test_check_float_gives_plain_floats(value: object) -> None:
    number = check_float("x", value, 0.0, 1.0, ConfigError)
    assert number == value
    assert type(number) is float


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "0.5", None, -0.1, 1.1, 10**400, 1j])
def test_check_float_refuses(value: object) -> None:
    with pytest.raises(ConfigError, match=r"x is .*; it must be a finite number >= 0 and <= 1"):
        check_float("x", value, 0.0, 1.0, ConfigError)


def test_check_float_open_and_unbounded_limits() -> None:
    assert check_float("x", 1e300, 0.0, math.inf, ConfigError) == 1e300
    with pytest.raises(ConfigError, match="> 0 and <= 1"):
        check_float("x", 0, 0.0, 1.0, ConfigError, low_excluded=True)
    with pytest.raises(ConfigError, match=r"must be a finite number >= 0$"):
        check_float("x", math.inf, 0.0, math.inf, ConfigError)


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_check_bool_refuses(value: object) -> None:
    assert check_bool("b", False, ConfigError) is False
    with pytest.raises(ConfigError, match=r"b is .*; it must be True or False"):
        check_bool("b", value, ConfigError)


@pytest.mark.parametrize("value", ["tea", None, ["cup"], 1])
def test_check_choice_refuses(value: object) -> None:
    assert check_choice("c", "cup", ("cup", "mug"), ConfigError) == "cup"
    with pytest.raises(ConfigError, match=r"c is .*; it must be one of 'cup', 'mug'"):
        check_choice("c", value, ("cup", "mug"), ConfigError)


def test_show_is_short_whatever_the_value() -> None:
    assert show("a" * 10**6) == "'" + "a" * 76 + "..."
    assert show(10**5000) == "a huge int"
    assert show(1.5) == "1.5"
