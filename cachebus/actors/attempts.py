"""Batches that a store was given and has not answered yet, and when to stop waiting for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cachebus.messages import Request

from .allowance import LONG, allowance
from .context import Context
from .latency import AdaptiveTimeout
from .ports import Timer

PUNCTUAL = 0.03
"""Seconds by which a timer may ring late without anything to be said about the event loop."""

_NEVER = float("inf")


class Attempt:
    """A batch that was handed to the store. `give_up` ends the wait for it."""

    __slots__ = ("batch", "due", "extended", "give_up", "long", "started", "ticket", "timeout")

    def __init__(self, batch: Sequence[Request[Any]], ticket: int, timeout: AdaptiveTimeout, started: float) -> None:
        self.batch = batch
        self.ticket = ticket
        self.timeout = timeout
        self.started = started
        self.due = started + timeout.current
        self.long = bool(batch) and type(batch[0]) in LONG  # Where it matters, they have batches of their own.
        self.extended = False
        self.give_up: Callable[[], None] | None = None


class Attempts:
    """The attempts under way. `overdue` is told of each whose time is up; it must take it.

    One timer for all, set anew only for an attempt that is due earlier: mostly it rings when everything that it was set
    for has long been answered, and what is looked at per batch is one comparison. `longest` is the time, in seconds,
    that a request whose duration grows with the number of keys has on top; `brisk` are how many attempts hold none.
    """

    def __init__(self, ctx: Context, longest: float, overdue: Callable[[Attempt, float], None]) -> None:
        self._timers = ctx.timers
        self._now = ctx.clock.monotonic
        self._longest = longest
        self._overdue = overdue
        self.brisk = 0
        self._outstanding: dict[Attempt, None] = {}
        self._armed_for = _NEVER
        self._timer: Timer | None = None

    def add(self, attempt: Attempt) -> None:
        """Watch over an attempt that begins now."""
        self._outstanding[attempt] = None
        self.brisk += not attempt.long
        if attempt.due < self._armed_for:
            self._arm(attempt.due)

    def take(self, attempt: Attempt) -> bool:
        """Whether nobody has settled an attempt before; now somebody has."""
        if self._outstanding.pop(attempt, attempt) is not None:
            return False
        self.brisk -= not attempt.long
        return True

    def _arm(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._armed_for = due
        self._timer = self._timers.call_at(due, self._check)

    def _check(self) -> None:
        now = self._now()
        # A timer that is late says that this loop stood still and heard nobody. The answers may be there by now, so they
        # are heard first: what we slept through is nobody's failure.
        if (deaf := now - self._armed_for) > PUNCTUAL:
            for attempt in self._outstanding:
                attempt.due += deaf + PUNCTUAL
        self._timer = None
        self._armed_for = _NEVER
        for attempt in [each for each in self._outstanding if each.due <= now]:
            # Looked at only now, because nearly every batch is answered long before.
            if not attempt.extended and (more := allowance(attempt.batch, self._longest)):
                attempt.extended = True
                attempt.due += more
            if attempt.due <= now:
                self._overdue(attempt, now)
        next_due = min((each.due for each in self._outstanding), default=_NEVER)
        if next_due < self._armed_for:
            self._arm(next_due)
