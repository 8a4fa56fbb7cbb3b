"""Which requests can run at all: what is refused at the door instead of waiting for ever."""

from __future__ import annotations

from dataclasses import dataclass

from minivllm.errors import QueueFullError, RequestError


@dataclass(frozen=True)
class Limits:
    """max_model_len: most tokens of a prompt and its answer. cache_tokens: tokens that the whole KV cache holds.
    max_num_waiting: most sequences that wait at once; None: any number."""

    max_model_len: int
    cache_tokens: int
    max_num_waiting: int | None

    def most_tokens(self, name: str, prompt_length: int, max_tokens: int) -> int:
        """`max_tokens`, lowered to what the context length leaves after the prompt of request `name`.

        Raises RequestError for an empty prompt, one that leaves no room for an answer, and a request that the whole
        cache could not hold.
        """
        if not 1 <= prompt_length < self.max_model_len:
            raise RequestError(
                f"the prompt of request {name!r} has {prompt_length} tokens; it must have from 1 to "
                f"{self.max_model_len - 1}, as max_model_len is {self.max_model_len} and holds prompt and answer"
            )
        max_tokens = min(max_tokens, self.max_model_len - prompt_length)
        if prompt_length + max_tokens - 1 > self.cache_tokens:  # the last token that is drawn is never computed
            raise RequestError(
                f"request {name!r} has a prompt of {prompt_length} tokens and max_tokens {max_tokens}, but at most "
                f"{self.cache_tokens + 1} together fit the KV cache; shorten the prompt, lower max_tokens, or "
                f"give the cache more blocks"
            )
        return max_tokens

    def check_queue(self, num_waiting: int, num_new: int) -> None:
        """Raise QueueFullError where num_new more would be too many; an empty queue takes any one request."""
        limit = self.max_num_waiting
        if limit is not None and num_waiting and num_waiting + num_new > limit:
            raise QueueFullError(f"{num_waiting} requests wait already and at most {limit} may; try again later")
