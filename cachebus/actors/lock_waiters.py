"""Who waits for locks at a manager: each caller, and the room that those of one lock share."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable

from cachebus.bus import Clock, Deferred
from cachebus.messages import AcquireLock, Failed, ReleaseLock, Reply


class Answer:
    """Where the reply to a request goes: it is returned by the handler, or given later."""

    __slots__ = ("_deferred", "_reply")

    def __init__(self) -> None:
        self._reply: Reply | None = None
        self._deferred: Deferred | None = None

    def give(self, reply: Reply) -> None:
        """Give the reply."""
        if self._deferred is None:
            self._reply = reply
        else:
            self._deferred.answer(reply)

    def take(self, defer: Callable[[], Deferred]) -> Reply | Deferred:
        """What the handler returns."""
        if self._reply is not None:
            return self._reply
        self._deferred = defer()
        return self._deferred

    @property
    def waiting(self) -> bool:
        """Whether somebody may still wait for it."""
        return self._reply is None if self._deferred is None else self._deferred.waiting


class Waiter:
    """One attempt to have a lock. `answer` is `None` while its caller has been told to ask again and has not yet.

    `until` is when it is answered, or given up if nobody asks; `ends` is how long its caller is patient. `asking` says that
    the store is being asked for it, `again` that it is to be asked once more after that, `left` that the caller has given
    up meanwhile. `trouble` is why the store could not be asked the last time.
    """

    __slots__ = ("again", "answer", "asking", "ends", "left", "queued", "request", "trouble", "until")

    def __init__(self, request: AcquireLock, answer: Answer, ends: float) -> None:
        self.request = request
        self.answer: Answer | None = answer
        self.ends = ends
        self.until = ends
        self.asking = False
        self.again = False
        self.left = False
        self.queued = False
        self.trouble: Failed | None = None

    @property
    def is_there(self) -> bool:
        """Whether the caller waits for an answer."""
        return self.answer is not None and self.answer.waiting

    def abandoned(self, *, unclaimed: bool = False) -> ReleaseLock:
        """The request that takes back what was asked for it. `unclaimed`, its caller may ask again, of another manager."""
        return ReleaseLock(self.request.name, self.request.ticket, abandon=not unclaimed, unclaimed=unclaimed)


class Room:
    """Those who wait for one lock, in the order in which they came. `owner` holds it, to `ends_at` as far as is known; at
    `check_at` the store is asked again, `pause` after the last time where it cannot tell. While it is `overdue` nobody has
    been told since that somebody else has the lock: the store may have lost everybody's place."""

    __slots__ = ("check_at", "ends_at", "overdue", "owner", "pause", "waiters")

    def __init__(self) -> None:
        self.waiters: dict[str, Waiter] = {}
        self.owner = ""
        self.ends_at = 0.0
        self.check_at = math.inf
        self.overdue = False
        self.pause = 0.0


class Agenda:
    """When to look at what: names of locks and tickets, each with a time. `ring`, told in how many seconds, sends for whoever
    looks, and returns a function that calls it off."""

    def __init__(self, clock: Clock, ring: Callable[[float], Callable[[], None]]) -> None:
        self._now = clock.monotonic
        self._ring = ring
        self._heap: list[tuple[float, int, str, str]] = []
        self._numbers = itertools.count()
        self._rings_at = math.inf
        self._call_off: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, when: float, name: str, ticket: str = "") -> None:
        """Look at a lock, or at one ticket, then. What is no longer of interest stays in."""
        heapq.heappush(self._heap, (when, next(self._numbers), name, ticket))
        self.arm(when)

    def arm(self, when: float) -> None:
        """Look then at the latest."""
        if when < self._rings_at:
            self._call_off()
            self._rings_at = when
            self._call_off = self._ring(when - self._now())

    def due(self, now: float) -> list[tuple[str, str]]:
        """What is due, taken out; what is not is looked at when it is."""
        self._rings_at = math.inf
        found: list[tuple[str, str]] = []
        while self._heap and self._heap[0][0] <= now:
            _, _, name, ticket = heapq.heappop(self._heap)
            found.append((name, ticket))
        if self._heap:
            self.arm(self._heap[0][0])
        return found

    def keep(self, entries: Iterable[tuple[float, str, str]]) -> None:
        """Keep these only."""
        self._heap = [(when, next(self._numbers), name, ticket) for when, name, ticket in entries]
        heapq.heapify(self._heap)
