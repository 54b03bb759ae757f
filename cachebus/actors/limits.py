"""The limits of a guard: how long it waits for a backend, and how many batches it has under way."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable

from cachebus.bus import Port, open_port
from cachebus.messages import CacheError, Overloaded

GROWTH = 1.5
"""Of the timeout, each time that it strikes. From 0.1 s on, a backend that suddenly takes 0.3 s is heard before five failures
open its circuit. One that does not answer has opened it after 1.3 s; doubling would take 3.1 s."""


class AdaptiveTimeout:
    """A timeout that follows the 95th percentile of the last `window` durations. All times are seconds.

    It is `factor` times the percentile, within `lowest` and `highest`, and `initial` before anything is known. A timeout
    that strikes makes it half as long again until an answer comes that did not need the addition (after Karn and
    Partridge, SIGCOMM 1987). Without that, the answers of a backend that has become slow would never be seen.
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
        """Note how long an answer took."""
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
        """Note that a call that began at `started` has no answer `now`, and return whether that is news.

        Calls that were under way together when the first of them was given up count once. The wait does not enter the
        window: there an outage would become the usual duration.
        """
        if started < self._struck_at:
            return False
        self._struck_at = now
        if self._base * self._penalty < self._highest:
            self._penalty *= GROWTH
            self.current = min(self._highest, self._base * self._penalty)
        return True


class ConcurrencyLimiter:
    """At most `limit` batches under way, of which `taken` are, and a bounded queue of callers before it. Belongs to one loop."""

    __slots__ = ("_address", "_granted", "_most", "limit", "queue", "taken")

    def __init__(self, limit: int, queue: int, address: str) -> None:
        self.taken = 0
        self.limit = limit
        self._most = queue
        self._address = address
        self.queue: deque[Port] = deque()
        self._granted: set[Port] = set()

    def __repr__(self) -> str:
        return f"<ConcurrencyLimiter {self.taken}/{self.limit} taken, {len(self.queue)}/{self._most} waiting>"

    async def acquire(self) -> None:
        """Take a place, waiting for it. Raises `Overloaded` if too many wait already, and the error of `refuse_all`."""
        if self.taken < self.limit:
            self.taken += 1
            return
        if len(self.queue) >= self._most:
            detail = f"{self.taken} batches ask {self._address} and {len(self.queue)} wait"
            raise Overloaded(detail, self._address, self._most)
        port = open_port()
        self.queue.append(port)
        try:
            refusal: CacheError | None = await port.wait()
        except BaseException:
            if port in self._granted:
                self._granted.remove(port)
                self.release()  # The place was ours already, and we do not take it.
            elif port in self.queue:
                self.queue.remove(port)
            raise
        if refusal is not None:
            raise refusal
        self._granted.discard(port)

    def release(self) -> None:
        """Give the place to the caller that has waited longest."""
        if self.queue:
            port = self.queue.popleft()
            self._granted.add(port)
            port.answer(None)
        else:
            self.taken -= 1

    def refuse_all(self, refusal: Callable[[], CacheError]) -> int:
        """Refuse every caller in the queue, each with an error of its own. Returns their number."""
        refused = len(self.queue)
        while self.queue:
            self.queue.popleft().answer(refusal())
        return refused
