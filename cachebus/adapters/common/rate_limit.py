"""Rate limiting: the algorithm used by every store, and the rate limits of a memory store.

The algorithm is the generic cell rate algorithm (ITU-T I.371, Annex A) in its leaky bucket form. Each unit taken raises
a level, which falls by `limit` units in `per` seconds. A unit that would raise the level above `burst` is denied. In
any period of t seconds, at most `burst + t * limit / per` units are taken. The Redis adapter implements the same
algorithm in Lua.

Times are integer microseconds, and levels are units times `per` in microseconds, so that rounding errors do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from cachebus.actors.ports import TimerQueue
from cachebus.messages import Admit, Admitted, BadMessage, RateLimitDenied

CLOCK_BACK = 2_000_000
"""Tolerated clock difference, in microseconds, between processes that share a limit on a server without a clock.

Within it, time stands still for the slower process. A clock that lags by more has been set back.
"""


class GcraState(NamedTuple):
    """State of a rate limit: the `level` at the time `stamp`, and the `limit` and `per` with which it falls."""

    level: int
    stamp: int
    limit: int
    per: int


def check_admit(request: Admit) -> None:
    """Raise `BadMessage` if a request is invalid."""
    for name, units in (("limit", request.limit), ("burst", request.burst), ("cost", request.cost)):
        if not 1 <= units <= Admit.MOST:
            raise BadMessage(f"{name} must be from 1 to {Admit.MOST:,}, not {units!r}")
    if not 0 < request.per <= Admit.LONGEST:
        raise BadMessage(f"per must be above 0 and at most {Admit.LONGEST:g} seconds, not {request.per!r}")
    if not 0 <= request.wait <= Admit.LONGEST:
        raise BadMessage(f"wait must be from 0 to {Admit.LONGEST:g} seconds, not {request.wait!r}")
    if request.cost > request.burst:
        raise BadMessage(f"cost must be at most burst ({request.burst}), not {request.cost}: it is never admitted")
    if request.burst * request.per / request.limit > Admit.LONGEST:
        raise BadMessage(f"a burst of {request.burst} must be replenished within {Admit.LONGEST:g} seconds")


def microseconds(seconds: float) -> int:
    """Convert seconds to integer microseconds."""
    return round(seconds * 1e6)


def per_of(request: Admit) -> int:
    """Return the `per` of a request in microseconds."""
    return max(1, microseconds(request.per))


def admit(request: Admit, state: GcraState | None, now: int) -> tuple[Admitted | RateLimitDenied, GcraState | None]:
    """Return the reply to a valid request, and the new state, or `None` if it is unchanged.

    `now` is in microseconds.
    """
    limit, per, at, level = request.limit, per_of(request), now, 0
    set_back = None
    if state is not None:
        kept, stamp, old_limit, old_per = state
        if stamp - now > CLOCK_BACK:
            # Store this state even if the request is denied. Otherwise no time would pass until the clock catches up.
            stamp, set_back = now, GcraState(kept, now, old_limit, old_per)
        at = max(now, stamp)
        level = max(0, kept - (at - stamp) * old_limit)
        if old_per != per:
            level = _up(level * per, old_per)
    room, after = request.burst * per, level + request.cost * per
    lag = at - now
    delay = lag + _up(after - room, limit) if after > room else 0
    if delay > microseconds(request.wait):
        left = max(0, room - level) // per
        return RateLimitDenied(left, delay / 1e6, (lag + _up(level, limit)) / 1e6), set_back
    reply = Admitted(max(0, room - after) // per, (lag + _up(after, limit)) / 1e6, delay / 1e6)
    return reply, GcraState(after, at, limit, per)


def _up(number: int, by: int) -> int:
    return -(-number // by)


class MeterTable:
    """Rate limits of a memory store, at most `most`.

    A limit that is fully replenished is removed. If the table is full, a new limit replaces the one that would be
    replenished first. `on_due` is called with the time at which `sweep` must run.
    """

    def __init__(self, now: Callable[[], float], on_due: Callable[[float], None], most: int) -> None:
        if most < 1:
            raise ValueError(f"max_limits must be at least 1, not {most!r}")
        self._now = now
        self._on_due = on_due
        self._most = most
        self._states: dict[str, GcraState] = {}
        self._empty: TimerQueue[str] = TimerQueue()
        self.due = self._empty.due  # Returns the time of the next `sweep`, or infinity if the table is empty.
        self._changing = False  # If it is still true when a turn begins, the last turn was interrupted.

    def __len__(self) -> int:
        return len(self._states)

    def __repr__(self) -> str:
        return f"<MeterTable {len(self._states)}/{self._most} limits>"

    def admit(self, request: Admit) -> Admitted | RateLimitDenied:
        check_admit(request)
        now, kept = self._now(), self._states.get(request.key)
        reply, state = admit(request, kept, microseconds(now))
        if state is None:
            return reply
        self._changing = True
        if kept is None:
            while len(self._states) >= self._most and (first := self._empty.pop(math.inf)) is not None:
                del self._states[first]
        # Rounded up to whole seconds, so that thousands of limits need at most one sweep per second.
        empty = math.ceil(now + reply.reset_after)
        self._states[request.key] = state
        first_due = self._empty.set(request.key, empty)
        self._changing = False
        if first_due:
            self._on_due(empty)
        return reply

    def sweep(self, limit: int) -> None:
        """Remove limits that are fully replenished, examining at most `limit` of them."""
        self._changing = True
        for key in self._empty.expire(self._now(), limit):
            del self._states[key]
        self._changing = False

    def repair(self) -> None:
        """Restore consistency after an interrupted turn, so that every limit is due for removal."""
        if self._changing:
            self._empty.clear()
            for key, state in self._states.items():
                self._empty.set(key, math.ceil((state.stamp + _up(state.level, state.limit)) / 1e6))
            self._changing = False

    def clear(self) -> None:
        self._states.clear()
        self._empty.clear()
