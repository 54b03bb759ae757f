"""The clock interface, and deadlines for many waiting calls with one timer per 20 ms.

An asyncio timer costs more than the rest of a coalesced request. A deadline here is one dictionary entry that is
inserted and removed (a single-level timing wheel: Varghese and Lauck, SOSP 1987).
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

TICK = 0.02  # Seconds by which an expiry may be late. A deadline may be overrun by 100 ms, so this is far below.
TICKS = 1 / TICK  # Ticks per second: multiplying is faster than dividing.


class Clock(Protocol):
    """A source of time. Durations and instants are float seconds.

    `monotonic` never jumps; it is used for every expiry, deadline and backoff. `wall` is Unix time; it only labels
    events and entries.
    """

    monotonic: Callable[[], float]
    wall: Callable[[], float]

    async def sleep_until(self, instant: float) -> None:
        """Wait until `monotonic()` reaches `instant`. Return immediately if it already has."""


class SystemClock:
    """The system's clocks."""

    __slots__ = ()

    # Plain functions as attributes, so that a hot path calls `time.monotonic` directly.
    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    async def sleep_until(self, instant: float) -> None:
        await anyio.sleep(max(0.0, instant - time.monotonic()))


SYSTEM_CLOCK = SystemClock()


class Watched(Protocol):
    """Something with a deadline, such as a reply port."""

    def answer(self, reply: Any) -> None: ...


Bucket = dict[Watched, Callable[[], Any]]


class Deadlines:
    """The deadlines of one event loop. Only the loop's thread uses them, so no lock is needed."""

    __slots__ = ("_buckets", "loop", "now", "thread")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self.thread = get_ident()
        # For asyncio's own loop, call the clock without `loop.time` around it: every call that waits reads it.
        self.now: Callable[[], float] = (
            monotonic if getattr(type(loop), "time", None) is BaseEventLoop.time else loop.time
        )
        self._buckets: dict[int, Bucket] = {}

    def watch(self, port: Watched, timeout: float, late: Callable[[], Any] = lambda: None) -> Bucket:
        """Answer `port` with `late()` after `timeout` seconds, unless it is removed from the returned bucket."""
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
    """Return the deadlines of the asyncio loop that runs in this thread, or `None` if no loop runs."""
    # Reuse the loop that this thread used last if it still runs: in Python 3.11, `get_running_loop` makes a system
    # call. (If another thread now runs that loop and this thread a second one, asyncio raises at the await.)
    deadlines = _current.deadlines
    if deadlines is not None and deadlines.loop.is_running():
        return deadlines
    loop = running_loop()
    if loop is None:
        return None
    _current.deadlines = deadlines = Deadlines(loop)
    return deadlines


def deadlines_here() -> Deadlines:
    """Return the deadlines of the asyncio loop that runs in this thread. Raises `RuntimeError` if no loop runs."""
    if (deadlines := running_deadlines()) is None:
        raise RuntimeError("no asyncio event loop is running in this thread")
    return deadlines
