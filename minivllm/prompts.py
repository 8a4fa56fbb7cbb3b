"""What a caller may pass as prompts, conversations and sampling parameters, in all its spellings, turned into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from minivllm.errors import RequestError
from minivllm.options import show
from minivllm.sampling_params import SamplingParams
from minivllm.text import Tokenizer

Prompt: TypeAlias = "str | Sequence[int] | Mapping[str, Any]"
Messages: TypeAlias = "Sequence[Mapping[str, Any]]"

_SPELLINGS = "a str, a list of token ids, or a dict with prompt_token_ids or prompt"


class ParsedPrompt(NamedTuple):
    """Token ids, and the text they came from where there was one. The ids are checked by the engine."""

    text: str | None
    token_ids: list[int]


def parse_prompts(tokenizer: Tokenizer, prompts: Any) -> list[ParsedPrompt]:
    """One prompt, or a list of them: str, token ids, {"prompt_token_ids": ...} or {"prompt": ...}, also mixed.

    Raises:
        RequestError: anything else, or an empty prompt; names the entry.
    """
    if isinstance(prompts, str | Mapping):
        return [_parse(tokenizer, prompts, "the prompt")]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise RequestError(f"prompts is {show(prompts)}; it must be {_SPELLINGS}, or a list of these")
    if not prompts:
        raise RequestError("prompts is an empty list; give at least one prompt")
    if all(isinstance(item, int) for item in prompts):
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
    keys = set(prompt)
    if keys == {"prompt"}:
        return _parse(tokenizer, prompt["prompt"], name)
    if keys not in ({"prompt_token_ids"}, {"prompt", "prompt_token_ids"}):
        raise RequestError(f"{name} has the keys {sorted(map(str, keys))}; it must have prompt_token_ids or prompt")
    ids, text = prompt["prompt_token_ids"], prompt.get("prompt")
    if isinstance(ids, str | Mapping) or not (text is None or isinstance(text, str)):
        raise RequestError(f"{name} is {show(prompt)}; prompt_token_ids must be a list of token ids and prompt a str")
    return ParsedPrompt(text, _parse(tokenizer, ids, f"{name}['prompt_token_ids']").token_ids)
