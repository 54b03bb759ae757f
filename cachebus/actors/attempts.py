"""Batches that a store was given and has not answered yet, and when to stop waiting for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from msgspec import Struct

from cachebus.messages import (
    AcquireLock,
    CacheTimeoutError,
    Clear,
    DeletePattern,
    DescribeLock,
    Failed,
    ReleaseLock,
    RenewLock,
    Reply,
    Request,
    SetMany,
)

from .actor import Context
from .latency import AdaptiveTimeout
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


class CallDeadlines(Protocol):
    """Until when the callers of a batch wait."""

    def seconds_left(self, now: float, *, longest: bool = False) -> float | None:
        """Until the first deadline, or the last one with `longest`; `None` without one."""
        ...


class FixedDeadline:
    """One deadline for a whole batch, on the clock's monotonic time."""

    __slots__ = ("_deadline",)

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline

    def seconds_left(self, now: float, *, longest: bool = False) -> float | None:
        """As `CallDeadlines.seconds_left`."""
        return None if self._deadline is None else self._deadline - now


class Attempt(Struct, eq=False):
    """A batch that was handed to the store.

    `then` takes its replies. `scope` breaks off the sending, while that is awaited. `extended` says that the attempt had
    more time than the adaptive timeout, so that its end says nothing about the backend's health. `short` is false for slow
    requests; where it matters, those have batches of their own.
    """

    requests: Sequence[Request[Any]]
    store: Any
    then: Callable[[Sequence[Reply]], None]
    callers: CallDeadlines | None
    ticket: int
    timeout: AdaptiveTimeout
    started: float
    due: float
    short: bool
    extended: bool = False
    progress: Progress = NO_PROGRESS
    scope: Any = None
    may_repeat: bool = True

    def too_late(self, detail: str, address: str, now: float) -> list[Failed]:
        """The replies of an attempt that is given up."""
        waited = now - self.started
        errors = (CacheTimeoutError(detail, address, waited, in_doubt=not each.IDEMPOTENT) for each in self.requests)
        return [Failed.of(error) for error in errors]


class Attempts:
    """The attempts under way: a guard enters them in `outstanding`, and arms the timer for one that is due before
    `armed_for`. `overdue` is given each whose time is up; it must call `take`.

    One timer for all, armed again only for an attempt that is due earlier: mostly everything that it was armed for has
    been answered when it fires, and what each batch costs is one comparison. `longest` bounds the extension of an attempt,
    in seconds; `short` is the number of attempts without slow requests.
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
        """Whether the attempt has not been settled before; now it has."""
        if self.outstanding.pop(attempt, attempt) is not None:
            return False
        self.short -= attempt.short
        return True

    def take_all(self) -> list[Attempt]:
        """Every attempt that is under way."""
        return [attempt for attempt in tuple(self.outstanding) if self.take(attempt)]

    def arm(self, due: float) -> None:
        """Look at the attempts again when it is `due`."""
        if self._timer is not None:
            self._timer.cancel()
        self.armed_for = due
        self._timer = self._timers.call_at(due, self._check)

    def _check(self) -> None:
        now = self._now()
        # A timer that is late says that this loop stood still and read nothing. The answers may have arrived by now, so they
        # are read first: what arrived during the stall is no failure.
        if (stall := now - self.armed_for) > PUNCTUAL:
            for attempt in self.outstanding:
                attempt.due += stall + PUNCTUAL
        self._timer = None
        self.armed_for = _NEVER
        for attempt in [each for each in self.outstanding if each.due <= now]:
            # Looked at only now, because nearly every batch is answered long before.
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
