"""What a caller may pass as prompts, conversations and sampling parameters, in all its spellings, turned into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from minivllm.errors import RequestError
from minivllm.options import show
from minivllm.sampling_params import SamplingParams
from minivllm.text import Tokenizer

Prompt: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"
Messages: TypeAlias = "Sequence[Mapping[str, Any]]"

MAX_CACHE_SALT_CHARACTERS = 256
_SPELLINGS = "a str, a list of token ids, or a dict with prompt_token_ids or prompt"


class ParsedPrompt(NamedTuple):
    """Token ids, and the text they came from where there was one. The ids are checked by the engine.

    cache_salt: only prompts of the same salt share what is cached.
    """

    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None


def parse_prompts(tokenizer: Tokenizer, prompts: Any) -> list[ParsedPrompt]:
    """One prompt, or a list of them: str, token ids, {"prompt_token_ids": ...} or {"prompt": ...}, also mixed.

    A dict may have a "cache_salt" beside these.

    Raises:
        RequestError: anything else, or an empty prompt; names the entry.
    """
    if isinstance(prompts, str | Mapping):
        return [_parse(tokenizer, prompts, "the prompt")]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError(f"prompts is {show(prompts)}; it must be {_SPELLINGS}, or a list of these")
    if not prompts:
        raise RequestError("prompts is an empty list; give at least one prompt")
    if _is_single(prompts):
        return [_parse(tokenizer, prompts, "the prompt")]
    return [_parse(tokenizer, prompt, f"prompts[{index}]") for index, prompt in enumerate(prompts)]


def parse_conversations(
    tokenizer: Tokenizer, messages: Any, tools: Sequence[Mapping[str, Any]] | None, template_kwargs: Mapping[str, Any]
) -> list[ParsedPrompt]:
    """One conversation (a list of messages) or a list of conversations, rendered with the model's chat template.

    Raises:
        RequestError: not a list. ChatTemplateError: the template refuses the messages, or the model has none.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(f"messages is {show(messages)}; it must be a list of messages, or a list of such lists")
    many = all(isinstance(item, list | tuple) for item in messages)
    return [
        ParsedPrompt(None, tokenizer.apply_chat_template(conversation, tools=tools, **template_kwargs))
        for conversation in (messages if many else [messages])
    ]


def parse_continuations(tokenizer: Tokenizer, continuations: Any, num_prompts: int) -> list[list[int]]:
    """One continuation a prompt, each a str or token ids, as token ids; for one prompt it need not be in a list.

    A text is encoded on its own: its first token does not depend on the prompt that it continues.

    Raises:
        RequestError: another type, an empty one, or another number of them.
    """
    if not isinstance(continuations, Sequence) or isinstance(continuations, bytes):
        raise RequestError(f"continuations is {show(continuations)}; it must have a str or token ids for each prompt")
    entries: Sequence[Any] = (continuations,) if _is_single(continuations) else continuations
    if len(entries) != num_prompts:
        raise RequestError(f"continuations has {len(entries)} entries for {num_prompts} prompts; give as many")
    for index, entry in enumerate(entries):
        if isinstance(entry, bytes | Mapping) or not isinstance(entry, Sequence) or not entry:
            raise RequestError(f"continuations[{index}] is {show(entry)}; it must be a str or token ids, at least one")
    return [tokenizer.encode(entry) if isinstance(entry, str) else list(entry) for entry in entries]


def params_for_each(params: Any, num_prompts: int) -> Sequence[SamplingParams]:
    """One SamplingParams for all prompts, one for each, or None for the defaults, as one for each.

    Raises:
        RequestError: another type, or a list of another length.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(one, SamplingParams) for one in params):
        raise RequestError(f"sampling_params is {show(params)}; it must be a SamplingParams or a list of them")
    if len(params) != num_prompts:
        raise RequestError(f"sampling_params has {len(params)} entries for {num_prompts} prompts; give 1 or as many")
    return params


def priorities_for_each(priority: Any, num_prompts: int) -> Sequence[int]:
    """One priority for all prompts, or one for each, as one for each. The numbers are checked by the engine.

    Raises:
        RequestError: a list of another length, or text.
    """
    single = not isinstance(priority, Sequence) or isinstance(priority, str | bytes)
    priorities = [priority] * num_prompts if single else list(priority)
    if len(priorities) != num_prompts:
        raise RequestError(f"priority has {len(priorities)} entries for {num_prompts} prompts; give 1 or as many")
    return priorities


def params_for_engine(tokenizer: Tokenizer, params: SamplingParams) -> SamplingParams:
    """`params` without what needs text: no stop strings, for whoever reads the text to look for, and bad words as ids.

    Raises:
        RequestError: a bad word that has too many tokens.
    """
    words = [form for word in params.bad_words for form in _forms_of(tokenizer, word)]
    if not params.stop and words == list(params.bad_words):
        return params
    return replace(params, stop=(), bad_words=list(dict.fromkeys(words)))


def _forms_of(tokenizer: Tokenizer, word: str | tuple[int, ...]) -> list[tuple[int, ...]]:
    """The ids of a bad word; most tokenizers spell a word behind a space with other tokens than one at the start."""
    if not isinstance(word, str):
        return [word]
    texts = [word] if word[0].isspace() else [word, f" {word}"]
    return [tuple(tokenizer.encode(text)) for text in texts]


def _is_single(sequence: Sequence[Any]) -> bool:
    """Whether it is one text or one list of token ids, rather than a list of such."""
    return isinstance(sequence, str) or all(isinstance(item, int) for item in sequence)


def _parse(tokenizer: Tokenizer, prompt: Any, name: str) -> ParsedPrompt:
    if isinstance(prompt, Mapping):
        return _parse_mapping(tokenizer, prompt, name)
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise RequestError(f"{name} is {show(prompt)}; it must be {_SPELLINGS}")
    if not prompt:
        raise RequestError(f"{name} is empty; give at least one character or token")
    if isinstance(prompt, str):
        return ParsedPrompt(prompt, tokenizer.encode(prompt, add_special_tokens=True))
    return ParsedPrompt(None, list(prompt))


def _parse_mapping(tokenizer: Tokenizer, prompt: Mapping[str, Any], name: str) -> ParsedPrompt:
    keys = set(prompt) - {"cache_salt"}
    if not keys or not keys <= {"prompt", "prompt_token_ids"}:
        raise RequestError(
            f"{name} has the keys {show(sorted(map(str, prompt)))}; it must have prompt_token_ids or prompt, "
            "and may have cache_salt"
        )
    salt, text = _checked_salt(prompt.get("cache_salt"), name), prompt.get("prompt")
    if "prompt_token_ids" not in keys:
        if isinstance(text, Mapping):
            raise RequestError(f"{name}['prompt'] is {show(text)}; it must be a str or a list of token ids")
        return _parse(tokenizer, text, f"{name}['prompt']")._replace(cache_salt=salt)
    ids = prompt["prompt_token_ids"]
    if isinstance(ids, str | Mapping) or not (text is None or isinstance(text, str)):
        raise RequestError(f"{name} is {show(prompt)}; prompt_token_ids must be a list of token ids and prompt a str")
    return ParsedPrompt(text, _parse(tokenizer, ids, f"{name}['prompt_token_ids']").token_ids, salt)


def _checked_salt(salt: Any, name: str) -> str | None:
    if salt is None or (isinstance(salt, str) and 1 <= len(salt) <= MAX_CACHE_SALT_CHARACTERS):
        return salt
    limit = f"a str of 1 to {MAX_CACHE_SALT_CHARACTERS} characters, or None"
    raise RequestError(f"{name}['cache_salt'] is {show(salt)}; it must be {limit}")
