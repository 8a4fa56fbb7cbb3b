"""What the runner must know of a request that is given a slot, taken from its `SamplingParams`."""

from __future__ import annotations

from minivllm.batch import SlotExtras, SlotParams
from minivllm.request import Request


def slot_params(request: Request, slot: int) -> SlotParams:
    """The part that every request has."""
    params = request.params
    return SlotParams(slot, params.temperature, params.top_k, params.top_p, params.min_p, request.seed)


def num_logprobs(request: Request) -> int | None:
    """How many of the likeliest tokens are told beside each drawn one; None: not even the drawn one's logprob.

    Choosing the best of several samples needs the logprobs of the drawn tokens, whether or not the caller sees them.
    """
    params = request.params
    if params.logprobs is None and params.num_samples > params.n:
        return 0
    return params.logprobs


def num_prompt_logprobs(request: Request) -> int | None:
    """The same for the tokens of the prompt; one sample tells them for all."""
    return request.params.prompt_logprobs if request.leader is None else None


def wants_prompt_logprobs(request: Request) -> bool:
    """Whether logprobs of prompt tokens are asked for and not all known yet."""
    known = len(request.prompt_logprobs)
    return num_prompt_logprobs(request) is not None and known < len(request.prompt_token_ids) - 1


def slot_extras(request: Request, slot: int) -> SlotExtras | None:
    """What a request wants beyond the usual; None where it wants nothing."""
    params = request.params
    min_tokens = params.min_tokens if request.stop_ids else 0
    logprobs, prompt_logprobs = num_logprobs(request), num_prompt_logprobs(request)
    plain = (
        params.presence_penalty == params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and not (params.logit_bias or params.bad_words or min_tokens or request.pooling)
        and params.allowed_token_ids is None
        and logprobs is None
        and prompt_logprobs is None
    )
    if plain:
        return None
    return SlotExtras(
        slot=slot,
        num_prompt_tokens=len(request.prompt_token_ids),
        token_ids=request.prompt_token_ids + request.output_token_ids,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        allowed_token_ids=params.allowed_token_ids,
        bad_words=params.bad_words,
        min_tokens=min_tokens,
        stop_ids=tuple(request.stop_ids),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        pooling=request.pooling,
    )
