"""Renders a conversation with the Jinja chat template that comes in a model folder.

Messages are checked before the template sees them, so that a wrong one is told by its index and not by a template's
line; and special tokens that a client spells are broken apart, so that they cannot end a turn (see `render_guarded`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from minivllm.errors import ChatTemplateError
from minivllm.text.sandbox import BUDGET, MAX_SIZE, BoundedEnvironment, RenderBudget

MAX_TEMPLATE = 1 << 20
"""Characters of a template's source; those in use have under 20,000."""

_ENVIRONMENT = BoundedEnvironment()
_PRIVATE_USE = range(0xF0000, 0xFFFFE)
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """One compiled chat template.

    Args:
        source: Jinja source, at most `MAX_TEMPLATE` characters.
        special_tokens: "bos_token", "eos_token", ... -> text, given to the template as variables.
        guarded_tokens: texts of two or more characters that only the template may spell, in `render_guarded`.

    Raises:
        ChatTemplateError: the source is too long or not a Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, guarded_tokens: Collection[str] = ()) -> None:
        if len(source) > MAX_TEMPLATE:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters; at most {MAX_TEMPLATE} are allowed"
            )
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except Exception as error:  # whatever a compiler may raise on a strange source
            raise ChatTemplateError(f"the model's chat template is not a Jinja template: {_told(error)}") from error
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._guarded = _guard_pattern(guarded_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> str:
        """Text of a conversation, as the model was trained to see it.

        Args:
            messages: one or more objects with a `role` (str) and a `content` (str); the content may be None or absent
                where there are `tool_calls`, and templates see "" then. Other fields are handed to the template.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: end with the opening of an assistant's turn.
            template_kwargs: further variables of the template, such as `enable_thinking`.

        Raises:
            ChatTemplateError: a message or tool has the wrong form; or the template refuses the conversation, fails,
                or goes beyond the bounds stated in `minivllm.text.sandbox` (the result has at most `MAX_SIZE`
                characters).
        """
        values = _checked_variables(messages, tools, template_kwargs)
        return self._render({**values, "add_generation_prompt": add_generation_prompt})

    def render_guarded(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> tuple[str, str]:
        """Like `render`, but guarded tokens that a client spells are broken apart: (text, mark).

        `mark` is a private-use character that stands nowhere in the inputs or the template. It was put behind every
        character of each spelling that lies in a string of messages, tools or template_kwargs (keys of objects too),
        and of a spelling's beginning at the end of such a string, which the template might complete. So a guarded
        token in the text was written by the template; without the marks the text is what `render` gives, unless the
        template looks at the spelling itself. `mark` is "" when nothing had to be broken.
        """
        values = _checked_variables(messages, tools, template_kwargs)
        try:
            values, mark = self._break_spellings(values)
        except RecursionError as error:
            raise ChatTemplateError("messages or tools are nested too deeply") from error
        return self._render({**values, "add_generation_prompt": add_generation_prompt}), mark

    def _render(self, variables: Mapping[str, Any]) -> str:
        budget = RenderBudget()
        chunks: list[str] = []
        size = 0
        try:
            for chunk in self._template.generate({**self._special_tokens, **variables, BUDGET: budget}):
                budget.step()
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_SIZE:
                    raise ChatTemplateError(f"the rendered conversation has over {MAX_SIZE} characters")
        except ChatTemplateError:
            raise
        except Exception as error:  # a template's expressions may raise anything
            raise ChatTemplateError(f"the model's chat template refuses this conversation: {_told(error)}") from error
        return "".join(chunks)

    def _break_spellings(self, values: dict[str, Any]) -> tuple[dict[str, Any], str]:
        strings = list(_strings(values))
        if not any(map(self._guarded.search, strings)):
            return values, ""
        used = set(self._source).union(*strings, *self._special_tokens.values())
        mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
        if mark is None:
            raise ChatTemplateError("messages use all private-use characters of plane 15; one must be left free")

        def broken(text: str) -> str:
            return self._guarded.sub(lambda match: mark.join(match.group()) + mark, text)

        return _map_strings(values, broken), mark


def _checked_variables(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, template_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Variables of the template from one client; raises ChatTemplateError naming the wrong one."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ChatTemplateError(f"messages is {_shown(messages)}; expected a list of one or more messages")
    if tools is not None and not isinstance(tools, (list, tuple)):
        raise ChatTemplateError(f"tools is {_shown(tools)}; expected a list of objects or None")
    for index, tool in enumerate(tools or ()):
        if not isinstance(tool, Mapping):
            raise ChatTemplateError(f"tools[{index}] is {_shown(tool)}; expected an object")
    taken = sorted(_RESERVED & template_kwargs.keys())
    if taken:
        raise ChatTemplateError(f"template argument {taken[0]!r} is set by minivllm itself; give it another name")
    checked = [_checked_message(index, message) for index, message in enumerate(messages)]
    return {**template_kwargs, "messages": checked, "tools": tools or None, "documents": None}


def _checked_message(index: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"messages[{index}] is {_shown(message)}; expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ChatTemplateError(f"messages[{index}].role is {_shown(role)}; expected a string such as 'user'")
    if content is None and message.get("tool_calls"):
        # Templates add the content to other text, which None does not allow; "" and None mean the same to them.
        return {**message, "content": ""}
    if not isinstance(content, str):
        raise ChatTemplateError(f"messages[{index}].content is {_shown(content)}; expected a string")
    return dict(message)


def _guard_pattern(tokens: Collection[str]) -> re.Pattern[str]:
    """Matches each token, the longest first, and a beginning of one at the end of the string."""
    beginnings = {token[:length] for token in tokens for length in range(1, len(token))}
    whole = [re.escape(token) for token in sorted(tokens, key=len, reverse=True)]
    cut = [re.escape(part) + r"\Z" for part in sorted(beginnings, key=len, reverse=True)]
    return re.compile("|".join(whole + cut) or "(?!)")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:80]}... ({type(value).__name__})" if len(text) > 80 else f"{text} ({type(value).__name__})"
