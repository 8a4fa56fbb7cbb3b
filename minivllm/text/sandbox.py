"""A Jinja environment for templates that nobody has reviewed: sandboxed, and with a bound on what a rendering may use.

Jinja's sandbox keeps a template away from Python's internals, but lets it run and grow without end. Here every pass
through a loop, macro or block first asks a budget, because the compiler is given a syntax tree with that question
written into it; and operations whose result can be far larger than what goes in are checked before they are done.

Guaranteed: at most `MAX_STEPS` passes and about `MAX_SECONDS`; no text or list above `MAX_SIZE` made by `+`, `~`, `*`,
a macro or a set block; no padding, indentation or format width above `MAX_NUMBER`; integers up to `MAX_BITS` bits; no
access to private attributes, to other files or to the objects handed in for writing. Not guaranteed: a single filter or
method over values that are each within these bounds (`join`, `replace`, a text of a deeply shared list) may still cost
more memory than they say.
"""

from __future__ import annotations

import functools
import json
import re
import string
import time
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SIZE = 8 << 20
"""Characters of a text, or items of a list."""
MAX_STEPS = 1_000_000
MAX_SECONDS = 10.0
MAX_NUMBER = 10_000
MAX_BITS = 4096

BUDGET = " budget"
"""Name of the `RenderBudget` among the variables of a rendering; the space keeps templates from naming it."""

_NUMBER_TAKING_FILTERS = ("batch", "center", "indent", "slice", "truncate", "wordwrap")
_PERCENT_WIDTH = re.compile(r"%[^a-zA-Z%]*(?:\d{5,}|\*)")


class RenderBudget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._steps = 0
        self._deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        """Count one pass through a loop, macro or block; raises SecurityError when there were too many."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} passes through loops, macros and blocks")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"rendering took more than {MAX_SECONDS:g} s")


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: marks assistants' text for training; rendering shows the inside."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of all chat templates, with the settings, filters and functions that Hugging Face gives them."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag])
        del self.globals["lipsum"]
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        self.filters["tojson"] = _tojson
        self.filters["format"] = _format
        for name in _NUMBER_TAKING_FILTERS:
            self.filters[name] = _with_small_numbers(self.filters[name])

    def step(self, context: Context) -> None:
        """Called by the compiled template at the start of every pass."""
        context.parent[BUDGET].step()

    def concat(self, parts: Iterable[str]) -> str:
        """Called by compiled templates to join the output of a macro or set block."""
        parts = list(parts)
        _check_size(sum(map(len, parts)))
        return "".join(parts)

    def join_values(self, values: Iterable[Any]) -> str:
        """The operator `~`."""
        return self.concat(map(str, values))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            _check_size(len(left) + len(right))
        elif operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            _check_percent(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if isinstance(getattr(obj, "__self__", None), str):
            _check_numbers((*args, *kwargs.values()))
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Called by jinja2 for each attribute that a template reads: `str.format` and `format_map` get a check."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_fields(value.__self__)
            return wrapped(*args, **kwargs)

        return checked

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Jinja would print a forbidden attribute as nothing; here it ends the rendering."""
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Jinja's hook between parsing and compiling."""
        _BudgetWriter().visit(source)  # changes the tree in place
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)


class _BudgetWriter(NodeTransformer):
    """Puts `environment.step(context)` first in every body that can run again, and makes `~` a checked call."""

    def _visit_body(self, node: Any) -> Any:
        self.generic_visit(node)
        call = _environment_call("step", nodes.ContextReference(lineno=node.lineno), node.lineno)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _visit_body

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _environment_call("join_values", nodes.List(node.nodes, lineno=node.lineno), node.lineno)


def _environment_call(method: str, argument: nodes.Expr, lineno: int) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method, lineno=lineno)
    return nodes.Call(function, [argument], [], None, None, lineno=lineno)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    _check_percent(form)
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's chat templates expect it: no HTML escapes (Jinja's own filter has them)."""
    _check_numbers((indent,))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    """Jinja's filter `format`: percent formatting."""
    _check_percent(str(value))
    return str(value) % (kwargs or args)


def _with_small_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # also copies jinja2's mark that the environment is the first argument
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_numbers((*args, *kwargs.values()))
        return function(*args, **kwargs)

    return checked


def _check_size(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"a text or list of size {size}; at most {MAX_SIZE} is allowed")


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise SecurityError(f"an integer of about {bits} bits; at most {MAX_BITS} are allowed")


def _check_product(left: Any, right: Any) -> None:
    for one, other in ((left, right), (right, left)):
        if isinstance(other, int) and hasattr(one, "__len__"):
            _check_size(len(one) * other)
    if isinstance(left, int) and isinstance(right, int):
        _check_bits(left.bit_length() + right.bit_length())


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and value > MAX_NUMBER:
            raise SecurityError(f"number {value} as a width or count; at most {MAX_NUMBER} is allowed")


def _check_percent(form: str) -> None:
    if _PERCENT_WIDTH.search(form):
        raise SecurityError(f"format {form[:80]!r} sets a width by '*' or one of over four digits")


def _check_fields(form: str) -> None:
    for _, _, spec, _ in string.Formatter().parse(form):
        if spec and ("{" in spec or re.search(r"\d{5,}", spec)):
            raise SecurityError(f"format {form[:80]!r} sets a width by another field or one of over four digits")
