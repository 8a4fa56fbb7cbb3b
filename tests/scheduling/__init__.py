"""Tests of the scheduler's parts, and the requests that they are tried with."""

from __future__ import annotations

from itertools import count
from typing import Any

from minivllm.cache.radix_tree import token_key
from minivllm.request import Request
from minivllm.sampling_params import SamplingParams

_OF_REQUEST = ("index", "leader", "priority", "cache_salt", "pooling", "output_token_ids")
_names = count()


def make_request(prompt: list[int], max_tokens: int = 16, *, stop: bool = False, **options: Any) -> Request:
    """A request as it stands after `Scheduler.add`. Options: of Request, or of SamplingParams."""
    own = {name: options.pop(name) for name in _OF_REQUEST if name in options}
    number = next(_names)
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens, **options),
        max_tokens=max_tokens,
        stop_ids=frozenset({7} if stop else ()),
        seed=number,
        arrival_number=number,
        key=token_key(prompt),
        num_known=len(prompt),
        num_to_schedule=len(prompt) + max_tokens - 1,
        **own,
    )
