"""Batches that a store has not answered yet, and when to stop waiting for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from msgspec import Struct

from cachebus.bus import SlotBatch
from cachebus.messages import (
    AcquireLock,
    Clear,
    DeletePattern,
    DescribeLock,
    ReleaseLock,
    RenewLock,
    Reply,
    Request,
    SetMany,
)

from .actor import Context
from .limits import AdaptiveTimeout
from .ports import NO_PROGRESS, SLOWEST_LINE, Progress, Timer

PUNCTUAL = 0.03
"""Seconds by which a timer may fire late without saying anything about the event loop."""

SLOW_REQUESTS = frozenset[type[Request[Any]]]({Clear, DeletePattern})
"""Requests whose duration grows with the number of keys stored: they have the longest timeout, and say nothing of others."""

LOCK_REQUESTS = frozenset[type[Request[Any]]]({AcquireLock, RenewLock, ReleaseLock, DescribeLock})
"""Requests with an adaptive timeout of their own."""

SLOWEST_KEY = 100e-6
"""Seconds that a backend may take for each key of a request about many."""

_NEVER = float("inf")


class Attempt(Struct, eq=False):
    """A batch that was handed to the store.

    `then` takes its replies, and `callers` knows until when they are worth waiting for. `scope` breaks off the sending,
    while that is awaited. `extended`: the attempt had more time than the adaptive timeout, so its end says nothing about the
    backend's health. `short` is false for slow requests; where it matters, those have batches of their own.
    """

    requests: Sequence[Request[Any]]
    store: Any
    then: Callable[[Sequence[Reply]], None]
    callers: SlotBatch | None
    ticket: int
    timeout: AdaptiveTimeout
    started: float
    due: float
    short: bool
    extended: bool = False
    progress: Progress = NO_PROGRESS
    scope: Any = None
    may_repeat: bool = True


class Attempts:
    """The attempts under way. A guard enters them in `outstanding`, and arms the timer for one that is due before
    `armed_for`. `overdue` is called with each whose time is up; it must call `take`.

    All share one timer, which is armed again only for an attempt that is due earlier, so a batch costs one comparison.
    `longest` bounds the extension of an attempt, in seconds. `short` counts the attempts without slow requests.
    """

    def __init__(self, ctx: Context, longest: float, overdue: Callable[[Attempt, float], None]) -> None:
        self._timers = ctx.timers
        self._now = ctx.clock.monotonic
        self._longest = longest
        self._overdue = overdue
        self.short = 0
        self.outstanding: dict[Attempt, None] = {}
        self.armed_for = _NEVER
        self._timer: Timer | None = None

    def take(self, attempt: Attempt) -> bool:
        """Take an attempt out. `False` if that was done before."""
        if self.outstanding.pop(attempt, attempt) is not None:
            return False
        self.short -= attempt.short
        return True

    def arm(self, due: float) -> None:
        """Look at the attempts again when it is `due`."""
        if self._timer is not None:
            self._timer.cancel()
        self.armed_for = due
        self._timer = self._timers.call_at(due, self._check)

    def _check(self) -> None:
        now = self._now()
        # If the timer is late, this loop stood still and read nothing. An answer that arrived meanwhile is no failure, so
        # answers are read first.
        if (stall := now - self.armed_for) > PUNCTUAL:
            for attempt in self.outstanding:
                attempt.due += stall + PUNCTUAL
        self._timer = None
        self.armed_for = _NEVER
        for attempt in [each for each in self.outstanding if each.due <= now]:
            # Only now, because nearly every batch is answered long before.
            self._extend(attempt, now)
            if attempt.due <= now:
                self._overdue(attempt, now)
        next_due = min((each.due for each in self.outstanding), default=_NEVER)
        if next_due < self.armed_for:
            self.arm(next_due)

    def _extend(self, attempt: Attempt, now: float) -> None:
        """Give an attempt more time for its size, and while bytes still move; but none after its callers have gone."""
        due = attempt.due
        if not attempt.extended:
            due += timeout_extension(attempt.requests, self._longest)
        if (moved := attempt.progress.last_progress) > attempt.started:
            due = max(due, moved + attempt.timeout.current)
        if due <= attempt.due:
            return
        left = None if attempt.callers is None else attempt.callers.seconds_left(now, longest=True)
        if left is not None:
            due = max(attempt.due, min(due, now + left))
        attempt.extended = attempt.extended or due > attempt.due
        attempt.due = due


def timeout_extension(requests: Sequence[Request[Any]], longest: float) -> float:
    """Seconds that a batch may take longer than others, for its bytes and keys; `longest` for slow requests."""
    if not SLOW_REQUESTS.isdisjoint(map(type, requests)):
        return longest
    keys = size = 0
    for request in requests:
        if isinstance(request, SetMany):
            keys += len(request.items)
            values: Iterable[Any] = request.items.values()
        else:
            keys += len(getattr(request, "keys", ()))
            values = (getattr(request, "value", None),)
        size += sum(len(value) for value in values if isinstance(value, bytes | str))
    return size / SLOWEST_LINE + keys * SLOWEST_KEY
