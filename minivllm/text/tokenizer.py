"""Text to token ids and back: byte-level BPE, run by tiktoken on ranks that `loaders` read from a model folder.

Added tokens are cut out of the text here, before normalisation and BPE, so that one place decides when a text that
spells `<|im_end|>` becomes that token (only when the caller says so) and when it stays text.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tiktoken

from minivllm.errors import ChatTemplateError, RequestError, TokenizerError
from minivllm.text.chat_template import ChatTemplate
from minivllm.text.loaders import TokenizerSpec, load_spec
from minivllm.text.normalize import nfc

MAX_WHITE_SPACE_RUN = 400_000
"""White space in a row, in characters; tiktoken's regex engine keeps a state for each and gives up at 1,000,000."""

_WHITE_SPACE = re.compile(r"\s+")
_PROBE = "Az09 \t\r\n  ~!@_-'s.\u00e9\u0301\u4e2d\ud55c\u0660\u3000\u200b\U0001f600\x00\x7f"


class Tokenizer:
    """The tokenizer of one model; make it with `from_pretrained`. Immutable, usable from several threads at once.

    Attributes:
        name_or_path: the folder it came from.
        chat_template: source of the model's Jinja chat template, or None.
        vocab_size: number of ids the model can emit; ids without text (padding of the model's output) count.
        eos_token_id, bos_token_id: ids of the end and begin tokens, or None.
        special_ids: ids of the tokens that steer the model rather than carry text.
    """

    def __init__(self, spec: TokenizerSpec, name_or_path: str) -> None:
        self.name_or_path = name_or_path
        self.chat_template = spec.chat_template
        self.vocab_size = spec.vocab_size
        self.special_ids = frozenset(spec.added_tokens[token] for token in spec.special_tokens)
        self._spec = spec
        self._bytes = _bytes_by_id(spec)
        self._added_pattern = _alternatives(spec.added_tokens)
        self._encoding = _build_encoding(spec, name_or_path)
        self.eos_token_id = self._named_id("eos_token")
        self.bos_token_id = self._named_id("bos_token")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Read the tokenizer of a local model folder (the kinds are in `minivllm.text.loaders.LOADERS`).

        Nothing is downloaded and nothing in the folder is executed.

        Raises:
            TokenizerError: the folder or a file of it is missing or cannot be used.
        """
        return cls(load_spec(Path(folder)), str(folder))

    def encode(self, text: str, *, add_special_tokens: bool = False, allow_special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any string of whole characters.
            add_special_tokens: put the BOS token first, where the model's tokenizer config asks for one.
            allow_special: text that spells an added token becomes that token; else it is ordinary text. Spellings are
                looked for in the text as given, the longest first, before normalisation.

        Raises:
            RequestError: `text` is not a str, has a lone surrogate, or has over `MAX_WHITE_SPACE_RUN` white space
                characters in a row.
        """
        _check_text(text)
        ids = self._encode_spelled(text) if allow_special else self._encode_plain(text)
        if add_special_tokens and self._spec.add_bos and self.bos_token_id is not None:
            ids.insert(0, self.bos_token_id)
        return ids

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **template_kwargs: Any,
    ) -> list[int]:
        """Token ids of a conversation, laid out by the model's chat template.

        Special tokens come from the template alone. Where a client's string (a content, a role, a tool's schema, a
        template argument; keys of objects too) spells a special token, the spelling is broken by a private-use
        character that occurs nowhere else, the template is rendered, the special tokens of the result are cut out, and
        the character is removed before the pieces between them are encoded. So

        * without such a spelling the ids are those of encoding the rendered text as a whole; and
        * with one, the only difference is that the spelling is encoded as ordinary text.

        A spelling that starts in a client's string and is completed by what the template writes behind it is broken
        too. What stays possible: a template that deletes characters inside a client's string could assemble a token.
        Added tokens that are not special (such as `<think>` or `<tool_call>`) are taken as tokens in contents as well,
        because assistants' turns are sent back with them.

        Args:
            messages: the conversation: see `ChatTemplate.render`.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: end with the opening of an assistant's turn.
            template_kwargs: further variables of the template, such as `enable_thinking`.

        Raises:
            ChatTemplateError: the model has no chat template, or it cannot render these messages.
            RequestError: the rendered text cannot be encoded: see `encode`.
        """
        text, mark = self._template.render_guarded(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
        _check_text(text)
        return self._encode_spelled(text, mark)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, ids without text become nothing.

        Raises:
            RequestError: an id is not an integer in 0..vocab_size - 1.
        """
        return self.decode_bytes(ids, skip_special_tokens=skip_special_tokens).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> bytes:
        """Bytes of token ids, before they are read as UTF-8; errors as in `decode`."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return b"".join([data for token in ids if (data := self.token_bytes(token)) and token not in skipped])

    def token_bytes(self, token: int) -> bytes:
        """Bytes of one token id, empty for ids without text; errors as in `decode`."""
        try:
            index = operator.index(token)
        except TypeError:
            index = -1
        if not 0 <= index < self.vocab_size:
            raise RequestError(f"token id {token!r} is not an integer in 0..{self.vocab_size - 1}")
        return self._bytes[index]

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ChatTemplateError(
                f"the model at '{self.name_or_path}' has no chat template; send a plain prompt, "
                "or put a chat_template.jinja into its folder"
            )
        return ChatTemplate(self.chat_template, self._spec.named_tokens, guarded_tokens=self._spec.special_tokens)

    def _encode_spelled(self, text: str, mark: str = "") -> list[int]:
        """Added tokens become their ids; `mark`, if given, is taken out of the text between them."""
        ids: list[int] = []
        for index, piece in enumerate(self._added_pattern.split(text)):
            if index % 2:  # the pattern has one group, so every second piece is an added token
                ids.append(self._spec.added_tokens[piece])
            elif piece:
                ids += self._encode_plain(piece.replace(mark, "") if mark else piece)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if self._spec.pairs.nfc:
            text = nfc(text)
        if len(text) > MAX_WHITE_SPACE_RUN:
            _check_white_space(text)
        try:
            return self._encoding.encode_ordinary(text)
        except BaseException as error:
            # tiktoken's Rust code panics when a pattern needs more than its regex engine allows; pyo3 raises panics
            # outside of Exception, and one text must not end the process.
            if type(error).__name__ != "PanicException":
                raise
            raise RequestError(
                f"text of {len(text)} characters is too much for the tokenizer's pattern: {error}"
            ) from None

    def _named_id(self, name: str) -> int | None:
        token = self._spec.named_tokens.get(name)
        if token is None:
            return None
        found = self._spec.added_tokens.get(token, self._spec.pairs.ranks.get(token.encode("utf-8", "replace")))
        if found is None:
            raise TokenizerError(f"'{self.name_or_path}': {name} {token!r} is not a token of the vocabulary")
        return found


def _build_encoding(spec: TokenizerSpec, name: str) -> tiktoken.Encoding:
    ranks, pattern = dict(spec.pairs.ranks), spec.pairs.pattern
    try:
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise TokenizerError(f"'{name}': the pattern {pattern!r} is not a regular expression: {error}") from error
    if encoding.decode(encoding.encode_ordinary(_PROBE)) != _PROBE:
        raise TokenizerError(f"'{name}': the pattern {pattern!r} skips characters; every character must match")
    return encoding


def _bytes_by_id(spec: TokenizerSpec) -> list[bytes]:
    table = [b""] * spec.vocab_size
    for token, index in spec.pairs.ranks.items():
        table[index] = token
    for text, index in spec.added_tokens.items():
        table[index] = text.encode("utf-8", "replace")
    return table


def _alternatives(tokens: Mapping[str, int]) -> re.Pattern[str]:
    """One group that matches any of the tokens, the longest first; no tokens, no match."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"text is {type(text).__name__}; expected a str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        raise RequestError(
            f"text has the lone surrogate U+{found:04X} at position {error.start}; it must consist of whole characters"
        ) from error


def _check_white_space(text: str) -> None:
    for run in _WHITE_SPACE.finditer(text):
        if run.end() - run.start() > MAX_WHITE_SPACE_RUN:
            raise RequestError(
                f"text has {run.end() - run.start()} white space characters in a row at position {run.start()}; "
                f"at most {MAX_WHITE_SPACE_RUN} are allowed"
            )
