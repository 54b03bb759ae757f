"""Time: the two clocks that everything below the facade asks, and deadlines of many waiting calls with one timer per 20 ms.

A timer of asyncio costs more than the rest of a coalesced request. A deadline here is one dictionary entry, put in and
taken out again (a timing wheel of one level: Varghese and Lauck, SOSP 1987).
"""

from __future__ import annotations

import threading
import time
from asyncio import AbstractEventLoop, BaseEventLoop
from collections.abc import Callable
from threading import TIMEOUT_MAX, get_ident
from time import monotonic
from typing import Any, Protocol

import anyio

from .compat import running_loop

TICK = 0.02  # Seconds by which an expiry may be late: far below the 100 ms that a deadline may be overrun by.
TICKS = 1 / TICK  # Ticks a second: a product takes less than a quotient.


class Clock(Protocol):
    """A source of time. Durations and instants are float seconds.

    `monotonic` never jumps and decides every expiry, deadline and back-off. `wall` is Unix time; it labels events and
    entries for people and decides nothing.
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


SYSTEM_CLOCK = SystemClock()


class Watched(Protocol):
    """Something with a deadline, such as a reply port."""

    def answer(self, reply: Any) -> None: ...


Bucket = dict[Watched, Callable[[], Any]]


def _nothing() -> None:
    """The default of `late`."""


class Deadlines:
    """The deadlines of one event loop. Used by the loop's own thread only, so it needs no lock."""

    __slots__ = ("_buckets", "loop", "now", "thread")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = get_ident()
        # The clock of asyncio's own loop without the method around it, because every call that waits looks at it.
        self.now: Callable[[], float] = (
            monotonic if getattr(type(loop), "time", None) is BaseEventLoop.time else loop.time
        )
        self._buckets: dict[int, Bucket] = {}

    def watch(self, port: Watched, timeout: float, late: Callable[[], Any] = _nothing) -> Bucket:
        """Answer `port` with `late()` after `timeout` seconds, unless it is taken out of the bucket returned."""
        if timeout > TIMEOUT_MAX:  # An infinite one has no tick.
            timeout = TIMEOUT_MAX
        tick = int((self.now() + timeout) * TICKS) + 1
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = {}
            self.loop.call_at(tick / TICKS, self._fire, tick)
        bucket[port] = late
        return bucket

    def _fire(self, tick: int) -> None:
        for port, late in self._buckets.pop(tick).items():
            port.answer(late())


class _Current(threading.local):
    deadlines: Deadlines | None = None


_current = _Current()


def running_deadlines() -> Deadlines | None:
    """The deadlines of the asyncio loop that runs in this thread; `None` if none does."""
    # Of the loop that this thread used last, if it still runs: asking for the running one costs Python 3.11 a system
    # call. (Should another thread have taken that loop over and this one run a second, asyncio says so at the await.)
    deadlines = _current.deadlines
    if deadlines is not None and deadlines.loop.is_running():
        return deadlines
    loop = running_loop()
    if loop is None:
        return None
    _current.deadlines = deadlines = Deadlines(loop)
    return deadlines


def deadlines_here() -> Deadlines:
    """The deadlines of the asyncio loop that runs in this thread. Raises `RuntimeError` if none does."""
    if (deadlines := running_deadlines()) is None:
        raise RuntimeError("no asyncio event loop runs here")
    return deadlines
