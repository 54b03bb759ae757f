"""Rate limiting: the rule that every store obeys, and the limits of a memory store.

The rule is the generic cell rate algorithm (ITU-T I.371, Annex A), in its form as a leaky bucket: each unit that is taken
raises a level, which sinks by `limit` units in `per` seconds, and no unit is taken that would raise it above `burst`. So in
any stretch of t seconds at most `burst + t * limit / per` units are taken. `redis_rates` has the same rule in Lua.

Instants are whole microseconds, and levels are units times the microseconds of `per`, so that no rounding adds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from cachebus.actors.ports import TimerQueue
from cachebus.messages import Admit, Admitted, BadMessage, RateLimitDenied

CLOCK_BACK = 2_000_000
"""Microseconds by which the clocks of processes may differ that share a limit in a server without a clock. Time then stands
still for the slower one. A clock that is behind by more has been set back."""


class GcraState(NamedTuple):
    """How much of a limit is used: the `level` at the time `stamp`, which sinks as `limit` and `per` said then."""

    level: int
    stamp: int
    limit: int
    per: int


def check_admit(request: Admit) -> None:
    """Raise `BadMessage` for a request that no limit can answer."""
    for name, units in (("limit", request.limit), ("burst", request.burst), ("cost", request.cost)):
        if not 1 <= units <= Admit.MOST:
            raise BadMessage(f"{name} must be from 1 to {Admit.MOST:,}, not {units!r}")
    if not 0 < request.per <= Admit.LONGEST:
        raise BadMessage(f"per must be a number of seconds above 0, and {Admit.LONGEST:g} at most, not {request.per!r}")
    if not 0 <= request.wait <= Admit.LONGEST:
        raise BadMessage(f"wait must be a number of seconds from 0 to {Admit.LONGEST:g}, not {request.wait!r}")
    if request.cost > request.burst:
        raise BadMessage(f"cost must not be above burst, else it is never admitted: {request.cost} > {request.burst}")
    if request.burst * request.per / request.limit > Admit.LONGEST:
        raise BadMessage(f"a burst of {request.burst} takes longer than {Admit.LONGEST:g} seconds to be there again")


def microseconds(seconds: float) -> int:
    """Return seconds as whole microseconds."""
    return round(seconds * 1e6)


def per_of(request: Admit) -> int:
    """Return the microseconds of the request's `per`."""
    return max(1, microseconds(request.per))


def admit(request: Admit, meter: GcraState | None, now: int) -> tuple[Admitted | RateLimitDenied, GcraState | None]:
    """Return the reply to a checked request, and the meter, if that changes. `now` is in microseconds."""
    limit, per, at, level = request.limit, per_of(request), now, 0
    set_back = None
    if meter is not None:
        kept, stamp, old_limit, old_per = meter
        if stamp - now > CLOCK_BACK:
            # To be kept even if nothing is taken: else no time would pass until the clock is where it was.
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
    """The meters of a memory store, at most `most` of them.

    A meter that is at 0 again is forgotten. If there is no room for a new one, the one that would be at 0 first goes: of
    that limit the least was used. `on_due` is called with the time at which `sweep` is needed.
    """

    def __init__(self, now: Callable[[], float], on_due: Callable[[float], None], most: int) -> None:
        if most < 1:
            raise ValueError(f"max_limits must be at least 1, not {most!r}")
        self._now = now
        self._on_due = on_due
        self._most = most
        self._meters: dict[str, GcraState] = {}
        self._empty: TimerQueue[str] = TimerQueue()
        self.due = self._empty.due  # Returns when to call `sweep` next; infinity while there are no meters.
        self._changing = False  # Still set when a turn begins, the last one was interrupted.

    def __len__(self) -> int:
        return len(self._meters)

    def __repr__(self) -> str:
        return f"<MeterTable {len(self._meters)}/{self._most} limits>"

    def admit(self, request: Admit) -> Admitted | RateLimitDenied:
        check_admit(request)
        now, kept = self._now(), self._meters.get(request.key)
        reply, meter = admit(request, kept, microseconds(now))
        if meter is None:
            return reply
        self._changing = True
        if kept is None:
            while len(self._meters) >= self._most and (first := self._empty.pop(math.inf)) is not None:
                del self._meters[first]
        # To the whole second, so that thousands of limits need no more than one sweep a second.
        empty = math.ceil(now + reply.reset_after)
        self._meters[request.key] = meter
        first_due = self._empty.set(request.key, empty)
        self._changing = False
        if first_due:
            self._on_due(empty)
        return reply

    def sweep(self, limit: int) -> None:
        """Forget what is at 0 again, looking at no more than `limit` meters."""
        self._changing = True
        for key in self._empty.expire(self._now(), limit):
            del self._meters[key]
        self._changing = False

    def repair(self) -> None:
        """Put right what an interrupted turn left half done: a limit that is not looked at when it is whole again."""
        if self._changing:
            self._empty.clear()
            for key, meter in self._meters.items():
                self._empty.set(key, math.ceil((meter.stamp + _up(meter.level, meter.limit)) / 1e6))
            self._changing = False

    def clear(self) -> None:
        self._meters.clear()
        self._empty.clear()
