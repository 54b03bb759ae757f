"""What this process holds for a time, leases and locks, renewed for as long as it is held."""

from __future__ import annotations

import math
from collections.abc import Callable

from msgspec import Struct

from cachebus.actors import Timers

PER_LEASE = 3
"""How often something is renewed within its own time, so that one lost renewal does not lose it."""


TOGETHER = 0.05
"""Seconds by which something is renewed early, with what is due before it."""


class _Tracked(Struct, eq=False):
    due: float
    renew: Callable[[], float | None]


class Renewals:
    """Renews leases and locks: one timer for all of them, and none while there are none. Usable from any thread.

    Most are given back long before they are renewed, so that to track one is a dictionary entry and a comparison. No
    lock is held. What is tracked has a timer that is due no later than itself: two threads that arm one at the same
    time leave two, of which the one that is noted in `_armed` goes on.
    """

    def __init__(self) -> None:
        self._tracked: dict[str, _Tracked] = {}
        self._armed = _NOT_ARMED

    def __len__(self) -> int:
        return len(self._tracked)

    def track(self, name: str, timers: Timers, due: float, renew: Callable[[], float | None]) -> None:
        """Call `renew` when `due` has come, on the loop of `timers`. It returns when to call it next, or `None` if it says
        so later, by `postpone`."""
        self._tracked[name] = _Tracked(due, renew)
        if due < self._armed[0]:
            self._arm(timers, due)

    def untrack(self, name: str) -> None:
        """Renew it no longer."""
        self._tracked.pop(name, None)

    def postpone(self, name: str, timers: Timers, due: float) -> None:
        """Renew it next when `due` has come, if it is tracked still."""
        if (tracked := self._tracked.get(name)) is not None:
            tracked.due = due
            if due < self._armed[0]:
                self._arm(timers, due)

    def _arm(self, timers: Timers, due: float) -> None:
        self._armed = armed = [due]
        timers.call_at(due, lambda: self._renew_due(timers, armed))

    def _renew_due(self, timers: Timers, armed: list[float]) -> None:
        if self._armed is not armed and self._armed[0] <= armed[0]:
            return  # Another timer goes on for both.
        self._armed = _RENEWING
        try:
            for tracked in self._tracked.copy().values():
                if tracked.due <= armed[0] + TOGETHER:
                    tracked.due = math.inf
                    if (due := tracked.renew()) is not None:
                        tracked.due = due
        finally:
            # Whoever tracks something before this is found below; whoever does after it arms a timer.
            self._armed = _NOT_ARMED
            due = min((each.due for each in self._tracked.copy().values()), default=math.inf)
            if due < self._armed[0]:
                self._arm(timers, due)


_NOT_ARMED = [math.inf]
_RENEWING = [-math.inf]
