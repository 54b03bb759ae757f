"""How long a backend takes, and how long it is therefore worth waiting for."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

GROWTH = 1.5
"""Of the timeout, by each that strikes. From 0.1 s a backend that suddenly takes 0.3 s is heard before five failures open
its circuit, and one that says nothing has opened it after 1.3 s; doubling would take 3.1 s."""


class AdaptiveTimeout:
    """A timeout that follows the 95th percentile of the last `window` durations. All times are seconds.

    It is `factor` times the percentile, within `lowest` and `highest`; `initial` before anything is known. Each timeout
    that strikes makes it half as long again, and it stays so until an answer comes that would have been in time without
    (after Karn and Partridge, SIGCOMM 1987): else a backend that has become slow would never again be heard to the end.
    """

    def __init__(
        self,
        *,
        window: int = 1000,
        lowest: float = 0.1,
        highest: float = 10.0,
        initial: float = 1.0,
        factor: float = 3.0,
    ) -> None:
        self.current = initial
        self._lowest = lowest
        self._highest = highest
        self._factor = factor
        self._base = initial
        self._penalty = 1.0
        self._struck_at = float("-inf")
        self._recent: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []

    def __repr__(self) -> str:
        return f"<AdaptiveTimeout {self.current:.3g} s, p95 {self.p95:.3g} s of {len(self._recent)}>"

    @property
    def p95(self) -> float:
        """The duration that 95 of 100 calls do not exceed; 0 before the first."""
        ordered = self._sorted
        return ordered[-(-len(ordered) * 19 // 20) - 1] if ordered else 0.0

    def answered(self, duration: float) -> None:
        """Take in how long an answer took."""
        if self._penalty > 1.0 and duration <= self._base:
            self._penalty = 1.0
        # Kept in order: two binary searches and two short moves of memory, 1 us for a window of 1000.
        recent, ordered = self._recent, self._sorted
        if len(recent) == recent.maxlen:
            del ordered[bisect_left(ordered, recent[0])]
        recent.append(duration)
        insort(ordered, duration)
        p95 = ordered[-(-len(ordered) * 19 // 20) - 1]
        self._base = min(self._highest, max(self._lowest, self._factor * p95))
        self.current = min(self._highest, self._base * self._penalty)

    def struck(self, started: float, now: float) -> bool:
        """Take in that a call that began at `started` has no answer `now`; says whether that is news. Calls that were under
        way together when the first of them was given up count once: they say one thing, that the timeout of then was too
        short.

        It is no duration of the window: there an outage would become what is usual, and the next one be met with more
        patience still.
        """
        if started < self._struck_at:
            return False
        self._struck_at = now
        if self._base * self._penalty < self._highest:
            self._penalty *= GROWTH
            self.current = min(self._highest, self._base * self._penalty)
        return True
