"""Deadlines of many waiting calls with one timer per 20 ms, instead of one timer a call.

A timer of asyncio's own costs more than the rest of a coalesced request; here a deadline is one dictionary
entry, put in and taken out again (a timing wheel of one level: Varghese and Lauck, SOSP 1987).
"""

from __future__ import annotations

import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import Any, Protocol

TICK = 0.02
"""Seconds by which an expiry may be late: far below the 100 ms that a deadline may be overrun by."""


class Watched(Protocol):
    """What has a deadline."""

    def answer(self, reply: Any) -> None: ...


Bucket = dict[Watched, Callable[[], Any]]


class Deadlines:
    """The deadlines of one event loop. Used by the loop's own thread only, so it needs no lock."""

    __slots__ = ("_buckets", "loop")

    def __init__(self, loop: AbstractEventLoop) -> None:
        self.loop = loop
        self._buckets: dict[int, Bucket] = {}

    def watch(self, port: Watched, timeout: float, late: Callable[[], Any]) -> Bucket:
        """Answer `port` with `late()` after `timeout` seconds, unless it is taken out of the bucket returned."""
        tick = int((self.loop.time() + min(timeout, threading.TIMEOUT_MAX)) / TICK) + 1  # An infinite one has no tick.
        bucket = self._buckets.get(tick)
        if bucket is None:
            bucket = self._buckets[tick] = {}
            self.loop.call_at(tick * TICK, self._fire, tick)
        bucket[port] = late
        return bucket

    def _fire(self, tick: int) -> None:
        for port, late in self._buckets.pop(tick).items():
            port.answer(late())


class _Current(threading.local):
    deadlines: Deadlines | None = None


_current = _Current()


def deadlines_of(loop: AbstractEventLoop) -> Deadlines:
    """The deadlines of the loop that runs in this thread."""
    deadlines = _current.deadlines
    if deadlines is None or deadlines.loop is not loop:
        deadlines = _current.deadlines = Deadlines(loop)
    return deadlines
