"""A clock that stands still until a test moves it."""

from __future__ import annotations

import threading
from collections.abc import Callable

from anyio.lowlevel import checkpoint

from cachebus.bus import ReplyPort, open_port


class ManualClock:
    """A `Clock` whose time passes only by `advance`. Usable from any thread, on asyncio and on trio."""

    def __init__(self, monotonic: float = 1000.0, wall: float = 1_700_000_000.0) -> None:
        self._guard = threading.Lock()
        self._now = monotonic
        self._offset = wall - monotonic
        self._sleepers: dict[ReplyPort, float] = {}
        self.monotonic: Callable[[], float] = lambda: self._now
        self.wall: Callable[[], float] = lambda: self._now + self._offset

    def __repr__(self) -> str:
        return f"<ManualClock at {self._now:g} s, {len(self._sleepers)} asleep>"

    @property
    def sleepers(self) -> int:
        """How many tasks sleep until an instant that has not come."""
        return len(self._sleepers)

    def jump(self, seconds: float) -> None:
        """Set the wall clock, as an administrator or NTP does. No time passes."""
        self._offset += seconds

    def advance(self, seconds: float) -> None:
        """Let time pass, and wake who has slept long enough."""
        with self._guard:
            self._now += seconds
            due = [port for port, instant in self._sleepers.items() if instant <= self._now]
            for port in due:
                del self._sleepers[port]
        for port in due:
            port.answer(None)

    async def sleep_until(self, instant: float) -> None:
        """Return when `monotonic()` has reached `instant`."""
        port = open_port()
        with self._guard:
            if instant > self._now:
                self._sleepers[port] = instant
        if port not in self._sleepers:
            await checkpoint()
            return
        try:
            await port.wait()
        finally:
            with self._guard:
                self._sleepers.pop(port, None)
