"""What a waiting request need not compute: it is cached, or its leader did it, or somebody is just about to."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from minivllm.cache.block_manager import BlockManager, Prefix
from minivllm.cache.radix_tree import common_blocks
from minivllm.request import Request
from minivllm.scheduling.slot_state import wants_prompt_logprobs


class Ahead(NamedTuple):
    """A running request that computes the first num_tokens tokens of a waiting one."""

    leader: Request
    num_tokens: int


def best_prefix(request: Request, blocks: BlockManager, computing: Collection[Request]) -> Prefix:
    """The longest computed beginning of `request`: in the cache, or in the table of its leader.

    The last token is always left to compute, as its logits are needed. `computing` are the requests whose prompt is
    not computed yet.
    """
    if wants_prompt_logprobs(request) or request.pooling == "mean":  # every token's own result is needed
        return blocks.match(b"", request.cache_salt, 0)
    prefix = blocks.match(request.key, request.cache_salt, request.num_known - 1)
    leader = request.leader
    if leader is None or leader.slot is None or leader.finish_reason is not None or leader in computing:
        return prefix
    num_shared = len(request.prompt_token_ids) - 1
    if num_shared > prefix.num_tokens:
        return blocks.prefix_of(leader.slot, num_shared)
    return prefix


def computed_by_another(
    request: Request, prefix: Prefix, computing: Collection[Request], block_size: int, prefix_aware: bool
) -> Ahead | None:
    """Who is computing so much of `request` beyond `prefix` that waiting for it pays.

    A sample waits for its leader. Any other waits, where `prefix_aware`, for at least half of what it would have to
    compute: less would delay it for little.
    """
    num_prompt = len(request.prompt_token_ids)
    if request.leader is not None and request.leader in computing and prefix.num_tokens < num_prompt - 1:
        return Ahead(request.leader, num_prompt)
    left = request.num_known - prefix.num_tokens
    if not prefix_aware or left == 1 or wants_prompt_logprobs(request) or request.pooling == "mean":
        return None
    key, block_bytes = request.key, len(request.key) // request.num_known * block_size
    least = -(-(2 * prefix.num_tokens + left) // (2 * block_size))
    if least * block_bytes > len(key):
        return None
    beginning = key[: least * block_bytes]
    for other in computing:
        if other.cache_salt == request.cache_salt and other.key.startswith(beginning):
            most = min(len(key), len(other.key)) // block_bytes
            return Ahead(other, common_blocks(key, other.key, 0, least, most, block_bytes) * block_size)
    return None
