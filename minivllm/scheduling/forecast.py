"""How many blocks the running requests will need at their worst moment: what admission asks before it lets one more in.

Reserving prompt + max_tokens for everybody leaves most of the cache empty, as most answers end early. Instead the
length of an answer is guessed from those that ended lately, and the use of blocks is followed forward through the ends
so guessed. The idea of forecasting the future peak from past lengths is LightLLM's "Past-Future scheduler" (Gong et al.
2025, arXiv:2507.10150). A wrong guess costs a preemption, never a deadlock.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

_WINDOW = 512  # answers remembered: enough for a quantile, few enough to follow a change of load
_QUANTILE = 0.9  # of the answers longer than this one already is; higher wastes blocks, lower preempts more


class LengthForecast:
    """Guesses how long an answer gets, from the lengths of the last answers that ended."""

    def __init__(self) -> None:
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []

    def record(self, num_tokens: int) -> None:
        """An answer ended after `num_tokens` tokens."""
        if len(self._recent) == _WINDOW:
            oldest = self._recent.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._recent.append(num_tokens)
        insort(self._sorted, num_tokens)

    def expect(self, num_generated: int, max_tokens: int) -> int:
        """The length that an answer of `num_generated` tokens so far may reach, at most max_tokens."""
        longer = bisect_right(self._sorted, num_generated)
        left = len(self._sorted) - longer
        if left:
            return min(max_tokens, self._sorted[longer + int(_QUANTILE * (left - 1))])
        if self._sorted:  # longer than all that is remembered
            return min(max_tokens, 2 * num_generated)
        return max_tokens


class Demand(NamedTuple):
    """One request's use of blocks, as the forecast sees it.

    remaining: decode steps that it will still take. num_tokens: tokens it holds when these begin.
    num_held: blocks in its table now. num_private: those of them that become available when it ends.
    """

    remaining: int
    num_tokens: int
    num_held: int
    num_private: int


def peak_demand(demands: Iterable[Demand], block_size: int) -> int:
    """The most blocks that `demands` together will take from those available now, at any time up to the last end.

    All decode in step, so use rises until somebody ends: only the moments of the ends need a look, O(n log n).
    """
    ordered = sorted(demands)
    begun = sum(-(-demand.num_tokens // block_size) - demand.num_held for demand in ordered)
    alive, given_back, peak = len(ordered), 0, 0
    for remaining, num_tokens, num_held, num_private in ordered:
        peak = max(peak, begun - given_back + alive * -(-remaining // block_size))
        begun -= -(-num_tokens // block_size) - num_held
        given_back += num_private
        alive -= 1
    return peak
