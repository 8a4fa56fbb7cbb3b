"""Token ids in, text out, a few ids at a time, as a stream of tokens arrives.

One token may end in the middle of a UTF-8 character, so the bytes go through Python's incremental UTF-8 decoder, which
keeps at most three undecided bytes; all the rest is text that no later token can change.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from minivllm.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one growing sequence of token ids, handed out piece by piece.

    The pieces of all `push` calls and of `finish`, joined, equal `tokenizer.decode` of all ids, wherever the ids were
    cut: a character is handed out once it is whole, and bytes that are not UTF-8 become U+FFFD as they do there. The
    cost of a `push` depends on the number of its ids alone.

    Args:
        tokenizer: the tokenizer of the model that makes the ids.
        skip_special_tokens: leave out the text of special tokens, as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """Text that became certain with these ids; empty while a character is incomplete.

        Raises:
            RequestError: an id is outside the vocabulary; the ids of this call are not taken in.
        """
        data = self._tokenizer.decode_bytes(ids, skip_special_tokens=self._skip_special_tokens)
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left when no more ids come: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)
