"""Time, handed in: the two clocks that everything below the facade asks, and the one sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import anyio


class Clock(Protocol):
    """A source of time. Durations and instants are float seconds.

    `monotonic` never jumps and decides every expiry, deadline and back-off. `wall` is Unix time; it labels
    events and entries for people and decides nothing.
    """

    monotonic: Callable[[], float]
    wall: Callable[[], float]

    async def sleep_until(self, instant: float) -> None:
        """Return when `monotonic()` has reached `instant`, or at once if it has."""


class SystemClock:
    """The clocks of this machine."""

    __slots__ = ()

    # Plain functions as attributes, so that a hot path binds time.monotonic itself with no call in between.
    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    async def sleep_until(self, instant: float) -> None:
        await anyio.sleep(max(0.0, instant - time.monotonic()))

    def __repr__(self) -> str:
        return "SystemClock()"


SYSTEM_CLOCK = SystemClock()
