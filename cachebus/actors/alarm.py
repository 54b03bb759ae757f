"""Messages that an actor sends itself later: one task and one sleep, however many there are."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable

import anyio

from cachebus.bus import Clock, Port, open_port


class Alarm:
    """Calls functions when their time has come. Set it from any thread; it rings while `run` runs."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        # Reentrant, because a finalizer that runs while it is held may write to the cache, and so set an alarm.
        self._guard = threading.RLock()
        self._changed: Port | None = None

    def set(self, delay: float, ring: Callable[[], None]) -> Callable[[], None]:
        """Call `ring` after `delay` seconds. Returns a function that calls it off."""
        entry = (self._clock.monotonic() + max(0.0, delay), next(self._numbers), ring)
        with self._guard:
            heapq.heappush(self._heap, entry)
            sooner = self._heap[0] is entry
        if sooner and (changed := self._changed) is not None:
            changed.answer(None)

        def call_off() -> None:
            with self._guard:
                if entry in self._heap:
                    self._heap.remove(entry)
                    heapq.heapify(self._heap)

        return call_off

    def clear(self) -> None:
        """Call everything off."""
        with self._guard:
            self._heap.clear()

    def __len__(self) -> int:
        return len(self._heap)

    async def run(self) -> None:
        """Ring until cancelled."""
        while True:
            changed = open_port()
            self._changed = changed
            for ring in self._due():
                ring()
            with self._guard:
                due = self._heap[0][0] if self._heap else None
            if due is None:
                await changed.wait()
                continue
            async with anyio.create_task_group() as race:

                async def sleep(until: float, scope: anyio.CancelScope) -> None:
                    await self._clock.sleep_until(until)
                    scope.cancel()

                race.start_soon(sleep, due, race.cancel_scope)
                await changed.wait()
                race.cancel_scope.cancel()

    def _due(self) -> list[Callable[[], None]]:
        now = self._clock.monotonic()
        due: list[Callable[[], None]] = []
        with self._guard:
            while self._heap and self._heap[0][0] <= now:
                due.append(heapq.heappop(self._heap)[2])
        return due
