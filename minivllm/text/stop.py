"""Stop strings in a text that grows piece by piece: where the text ends, and how much of it is certain already.

Text at the end that may still become a stop string is held back, and nothing more. Each string is looked for by the
method of Knuth, Morris and Pratt (SIAM J. Comput. 6, 1977), which reads every character once, remembers only how much
of the string the text ends with, and so does not care how the text was cut.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Ends one growing text where the first of `strings` is complete.

    The match that is complete first wins, of those that are complete at the same character the longest: so the result
    is the same however the text is cut. The cost of a character is a few steps for each string, over the whole text.

    Args:
        strings: each of at least one character.
        include: let the text end behind the match instead of before it.

    Attributes:
        matched: the string that ended the text; None while none has.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self.matched: str | None = None
        self._include = include
        self._searches = [_Search(string) for string in strings]
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Take in the next piece; returns the text that is certain now, and after a match nothing any more.

        may_stop: whether a string that becomes complete in this piece ends the text, or is text like any other.
        """
        if self.matched is not None:
            return ""
        ends = [(search.read(text, may_stop), -len(search.string), search.string) for search in self._searches]
        found = min((end for end in ends if end[0] >= 0), default=None)
        text = self._held + text
        if found is None:
            certain = len(text) - max((search.length for search in self._searches), default=0)
        else:
            self.matched = found[2]
            certain = len(self._held) + found[0] - (0 if self._include else len(self.matched))
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """What was held back, now that no more text comes; nothing after a match."""
        held, self._held = self._held, ""
        return held if self.matched is None else ""


class _Search:
    """One string, and how far the text read so far ends with a beginning of it (`length` characters, never all).

    `_borders[k]` is the length of the longest string that the first k characters both begin and end with, but for
    themselves. It is filled in only as far as texts come close to the string, so that long strings cost nothing.
    """

    __slots__ = ("_borders", "length", "string")

    def __init__(self, string: str) -> None:
        self.string = string
        self.length = 0
        self._borders = [-1, 0]

    def read(self, text: str, may_stop: bool) -> int:
        """Read on; returns the index in `text` behind the first match, where reading ends, or -1."""
        string, length, index = self.string, self.length, 0
        while index < len(text):
            if not length:
                index = text.find(string[0], index)
                if index < 0:
                    break
            elif text[index] != string[length]:
                length = self._border(length)
                continue
            index += 1
            length += 1
            if length == len(string):
                length = self._border(length)
                if may_stop:
                    self.length = length
                    return index
        self.length = length
        return -1

    def _border(self, length: int) -> int:
        string, borders = self.string, self._borders
        while len(borders) <= length:
            last = string[len(borders) - 1]
            border = borders[-1]
            while border >= 0 and string[border] != last:
                border = borders[border]
            borders.append(border + 1)
        return borders[length]
