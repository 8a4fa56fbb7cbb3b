"""Templates that mean harm are stopped, soon and with a ChatTemplateError."""

from __future__ import annotations

import time

import pytest

from minivllm.errors import ChatTemplateError
from minivllm.text import ChatTemplate

USER = [{"role": "user", "content": "x"}]
DOUBLE = (
    "{% set n = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set n.x = EXPR %}{% endfor %}{{ n.x | length }}"
)
HARMFUL = {
    "private attribute": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "function internals": ("{{ raise_exception.__globals__ }}", "unsafe"),
    "change of messages": ("{{ messages.append(1) }}", "unsafe"),
    "other file": ("{% include 'etc/passwd' %}", "loader"),
    "long range": ("{% for i in range(10 ** 9) %}{% endfor %}", "too big"),
    "nested loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "passes"),
    "long loop over text": ("{% for i in 'ab' * 4000000 %}{% endfor %}", "passes"),
    "loop that calls itself": ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion"),
    "macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "macro tree": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "passes",
    ),
    "block tree": (
        "{% block a %}{% endblock %}{% macro f(n) %}{% if n %}{{ self.a() }}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
        "{% endmacro %}{{ f(60) }}",
        "passes",
    ),
    "large output": ("{% for i in range(100000) %}{{ 'abcdefgh' * 50 }}{% endfor %}", "over 8388608 characters"),
    "large text": ("{{ 'a' * 10 ** 10 }}", "size 10000000000"),
    "large list": ("{{ ([1] * 10 ** 10) | length }}", "size 10000000000"),
    "large factor first": ("{{ 10 ** 10 * 'a' }}", "size 10000000000"),
    "large power": ("{{ 10 ** (10 ** 10) }}", "bits"),
    "large product": (DOUBLE.replace("'abcdefgh'", "3").replace("EXPR", "n.x * n.x"), "bits"),
    "doubling by +": (DOUBLE.replace("EXPR", "n.x + n.x"), "size"),
    "doubling by ~": (DOUBLE.replace("EXPR", "n.x ~ n.x"), "size"),
    "doubling by a set block": (
        DOUBLE.replace("{% set n.x = EXPR %}", "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"),
        "size",
    ),
    "doubling by a macro": (
        "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}" + DOUBLE.replace("EXPR", "f(n.x)"),
        "size",
    ),
    "padding": ("{{ 'a'.ljust(10 ** 10) }}", "number 10000000000"),
    "padding filter": ("{{ 'a' | center(10 ** 10) }}", "number 10000000000"),
    "indentation": ("{{ 'a' | indent(10 ** 10, true) }}", "number 10000000000"),
    "indented JSON": ("{{ {'a': 1} | tojson(indent=10 ** 10) }}", "number 10000000000"),
    "percent width": ("{{ '%9999999999d' % 1 }}", "width"),
    "percent star": ("{{ '%*d' % (10 ** 10, 1) }}", "width"),
    "percent filter": ("{{ '%9999999999d' | format(1) }}", "width"),
    "format width": ("{{ '{:9999999999}'.format(1) }}", "width"),
    "format nested": ("{{ '{:{}}'.format(1, 10 ** 10) }}", "width"),
    "date width": ("{{ strftime_now('%9999999999d') }}", "width"),
    "filler text": ("{{ lipsum(10 ** 10) }}", "undefined"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_template_is_stopped(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("minivllm.text.sandbox.MAX_STEPS", 100_000)  # the same stop, ten times sooner
    source, message = HARMFUL[name]
    start = time.perf_counter()
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source, {}).render(USER)
    assert time.perf_counter() - start < 5.0


def test_wall_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.text.sandbox.MAX_SECONDS", 0.2)
    slow = "{% for i in range(100000) %}{% set x = ('ab' * 100000) | upper %}{% endfor %}"
    start = time.perf_counter()
    with pytest.raises(ChatTemplateError, match=r"took more than 0.2 s"):
        ChatTemplate(slow, {}).render(USER)
    assert time.perf_counter() - start < 2.0


def test_renderings_do_not_share_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minivllm.text.sandbox.MAX_STEPS", 1000)
    template = ChatTemplate("{% for i in range(900) %}{% endfor %}done", {})
    assert [template.render(USER) for _ in range(5)] == ["done"] * 5
