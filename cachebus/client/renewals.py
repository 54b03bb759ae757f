"""Renewal of the leases and locks that this process holds."""

from __future__ import annotations

import math
from collections.abc import Callable

from msgspec import Struct

from cachebus.actors import Timers

PER_LEASE = 3
"""Number of renewals per lifetime, so that a single lost renewal does not lose the lease or lock."""

TOGETHER = 0.05
"""Renewals that are due within this many seconds of each other run together, the later ones early."""


class _Tracked(Struct, eq=False):
    due: float
    renew: Callable[[], float | None]


class Renewals:
    """Renewal schedule of leases and locks. They share one timer, which exists only while any is tracked. Thread-safe.

    Most leases are released long before they are renewed, so tracking one costs a dictionary entry and a comparison,
    without a mutex. Every tracked lease has a timer that is due no later than the lease. If two threads arm a timer at
    the same time, both timers fire; the one in `_armed` continues.
    """

    def __init__(self) -> None:
        self._tracked: dict[str, _Tracked] = {}
        self._armed = _NOT_ARMED

    def __len__(self) -> int:
        return len(self._tracked)

    def track(self, name: str, timers: Timers, due: float, renew: Callable[[], float | None]) -> None:
        """Call `renew` at the time `due`, on the loop of `timers`.

        `renew` returns the time of its next call, or `None` to set it later with `postpone`.
        """
        self._tracked[name] = _Tracked(due, renew)
        if due < self._armed[0]:
            self._arm(timers, due)

    def untrack(self, name: str) -> None:
        """Stop renewing a lease or lock."""
        self._tracked.pop(name, None)

    def postpone(self, name: str, timers: Timers, due: float) -> None:
        """Set the time of the next renewal to `due`, if the lease or lock is still tracked."""
        if (tracked := self._tracked.get(name)) is not None:
            tracked.due = due
            if due < self._armed[0]:
                self._arm(timers, due)

    def _arm(self, timers: Timers, due: float) -> None:
        self._armed = armed = [due]
        timers.call_at(due, lambda: self._renew_due(timers, armed))

    def _renew_due(self, timers: Timers, armed: list[float]) -> None:
        if self._armed is not armed and self._armed[0] <= armed[0]:
            return  # Another timer, due no later, continues.
        self._armed = _RENEWING
        try:
            for tracked in self._tracked.copy().values():
                if tracked.due <= armed[0] + TOGETHER:
                    tracked.due = math.inf
                    if (due := tracked.renew()) is not None:
                        tracked.due = due
        finally:
            # Leases tracked before this assignment are found below; those tracked after it arm a timer.
            self._armed = _NOT_ARMED
            due = min((each.due for each in self._tracked.copy().values()), default=math.inf)
            if due < self._armed[0]:
                self._arm(timers, due)


_NOT_ARMED = [math.inf]
_RENEWING = [-math.inf]
