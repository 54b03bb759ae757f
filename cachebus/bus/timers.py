"""Timers: callbacks on an event loop, with one queue for each loop.

The event loop holds a single native timer, for the earliest callback. When another thread schedules or cancels a timer,
or a finalizer does so while the queue is being changed, the change is appended to a deque. The loop then applies it. No
lock is held, so neither side waits for the other:

    loop                                        another thread
    ----                                        --------------
    apply the changes in the deque              append the change to the deque
    schedule the native timer, record its time  if it is due before the recorded time: wake the loop
    check the deque once more
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import Context
from threading import get_ident
from typing import Any, Generic, TypeVar

from msgspec import Struct

from .clock import SYSTEM_CLOCK, Clock, SystemClock
from .compat import running_loop
from .spawn import spawn

logger = logging.getLogger("cachebus.bus")
K = TypeVar("K")

_SLACK = 64  # Number of stale heap entries that are always allowed.
_BACKLOG = 1000  # Number of queued changes by other threads above which the loop is woken.
_MAX_DELAY = 86400.0  # Maximum delay of the loop's timer in seconds; it is then scheduled again.
_LOGGED = 100  # Maximum number of kinds of callback failures that are logged; all are counted.


class TimerQueue(Generic[K]):
    """A priority queue of keys, each with one due time. Not thread-safe.

    The heap is lazy: moving a key to a later time, or discarding it, only changes a dictionary. The stale heap entry is
    removed when it reaches the top, or when more than half of the heap is stale. The heap is therefore bounded by twice
    the number of keys. Keys that are due at the same time are returned in the order in which they were set.
    """

    __slots__ = ("_due", "_heap", "_numbers")

    def __init__(self) -> None:
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, key: object) -> bool:
        return key in self._due

    def __iter__(self) -> Iterator[K]:
        return iter(self._due)

    def set(self, key: K, when: float) -> bool:
        """Set the due time of a key, and replace an earlier setting. Return `True` if no key is due before it."""
        before = self._due.get(key)
        self._due[key] = when
        if before is not None and before <= when:
            return False  # Its heap entry reaches the top earlier and is moved then.
        heapq.heappush(self._heap, (when, next(self._numbers), key))
        self._tidy()
        return self._heap[0][0] >= when

    def set_earlier(self, key: K, when: float) -> bool:
        """Set the due time of a key, unless it is already due by then."""
        before = self._due.get(key)
        return (before is None or when < before) and self.set(key, when)

    def discard(self, key: K) -> None:
        """Remove a key if it is in the queue."""
        if self._due.pop(key, None) is not None:
            self._tidy()

    def due(self) -> float:
        """Return the time at which to check the queue next, or infinity if it is empty.

        This is the earliest due time, or an earlier one if a key was moved.
        """
        heap, due = self._heap, self._due
        while heap:
            when, _, key = heap[0]
            if key in due:
                return when
            heapq.heappop(heap)
        return math.inf

    def pop(self, now: float) -> K | None:
        """Remove and return the first key that is due at `now`, or return `None`."""
        return next(self.expire(now), None)

    def expire(self, now: float, limit: float = math.inf) -> Iterator[K]:
        """Remove and yield the keys that are due at `now`, in order. Examines at most `limit` keys."""
        heap, due = self._heap, self._due
        while heap and heap[0][0] <= now and limit > 0:
            noted, number, key = heap[0]
            when = due.get(key)
            if when is None or when < noted:
                heapq.heappop(heap)
            elif when > noted:
                heapq.heapreplace(heap, (when, number, key))
                limit -= when > now  # Otherwise it is counted when it is removed.
            else:
                limit -= 1
                heapq.heappop(heap)
                del due[key]
                yield key

    def clear(self) -> None:
        """Remove all keys."""
        self._due.clear()
        self._heap.clear()

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._due) + _SLACK:
            # In place, because `expire` may be iterating.
            self._heap[:] = [(when, number, key) for number, (key, when) in enumerate(self._due.items())]
            heapq.heapify(self._heap)
            self._numbers = itertools.count(len(self._heap))


class Timer(Struct, eq=False):
    """A callback that is scheduled for `when`, unless it is cancelled."""

    loop: _LoopQueue | None
    owner: LoopTimers
    when: float
    callback: Callable[[], Any] | None

    def __repr__(self) -> str:
        return f"<Timer at {self.when:g} s{', over' if self.callback is None else ''}>"

    def cancel(self) -> None:
        """Cancel the callback. Thread-safe. Does nothing if the callback has run or was cancelled."""
        if self.callback is not None:
            self.callback = None
            if self.loop is not None:
                self.loop.change(self, self.when)


class LoopTimers:
    """The timers of one owner on an event loop, with times on `clock.monotonic`. Implements `Timers`.

    `start` binds them to the running loop. No callback runs before that, or after `close`. All owners on a loop share
    one queue, except those with a custom clock. A callback must not wait. Its errors are counted in `failures` and
    logged once per kind.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._now = clock.monotonic
        self._loop: _LoopQueue | None = None
        self.open = False
        self.failures = 0

    def __repr__(self) -> str:
        return f"<LoopTimers {'open' if self.open else 'closed'}, {len(self)} scheduled>"

    def __len__(self) -> int:
        return 0 if self._loop is None else self._loop.count(self)

    def start(self) -> None:
        """Start on the event loop that runs in this thread."""
        self._loop = _queue_of_running_loop(self._clock)
        self.open = True

    def call_at(self, when: float, callback: Callable[[], Any]) -> Timer:
        """Call `callback` when `clock.monotonic` reaches `when`. May be called from any thread and from finalizers."""
        if when != when:
            raise ValueError(f"the time of a timer must be a number, not {when!r}")
        loop = self._loop
        timer = Timer(loop, self, when, callback)
        if loop is None or not self.open:
            timer.callback = None
        else:
            loop.change(timer, when)
        return timer

    def call_after(self, delay: float, callback: Callable[[], Any]) -> Timer:
        """Call `callback` after `delay` seconds. Otherwise like `call_at`."""
        return self.call_at(self._now() + delay, callback)

    def close(self) -> None:
        """Cancel all timers. Safe to call twice and from any thread."""
        self.open = False
        if self._loop is not None:
            self._loop.change(self, -math.inf)

    def forked(self) -> None:
        """Close the timers in a forked child, which does not have the event loop."""
        self.open = False
        self._loop = None


class _LoopQueue:
    """The timers of one event loop. Other threads may call `change`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._now = clock.monotonic
        self._thread = get_ident()
        self._queue: TimerQueue[Timer] = TimerQueue()
        self._changed: deque[Timer | LoopTimers] = deque()
        self._busy = False
        self._waking = False
        self._armed_for = math.inf
        self._disarm: Callable[[], object] = lambda: None
        self._logged: set[tuple[object, type[Exception]]] = set()
        self.loop = loop = _current_loop()
        self._is_asyncio = isinstance(loop, AbstractEventLoop)
        self._call_soon: Callable[[Callable[[], object]], object] = (
            loop.call_soon_threadsafe if self._is_asyncio else loop.run_sync_soon
        )

    def count(self, owner: LoopTimers) -> int:
        """Return the number of timers of an owner. Call it on the loop's thread."""
        self._settle()
        return sum(each.owner is owner for each in self._queue)

    def change(self, changed: Timer | LoopTimers, when: float) -> None:
        """Apply a change: a timer was scheduled or cancelled, or an owner was closed. `when` is the time it is due."""
        self._changed.append(changed)
        if get_ident() == self._thread:
            self._settle()
        elif when < self._armed_for or len(self._changed) > _BACKLOG:
            self._wake()

    def _wake(self) -> None:
        if self._waking:
            return
        self._waking = True
        try:
            self._call_soon(self._settle)
        except RuntimeError:
            # The loop is closed, so no more callbacks run.
            self._changed.clear()
            self._waking = False

    def _settle(self) -> None:
        """Apply the pending changes, and schedule the loop's timer for the earliest callback."""
        if self._busy:
            return  # The outer call on this stack checks the deque once more.
        while True:
            self._busy = True
            try:
                self._waking = False
                while self._changed:
                    changed = self._changed[0]
                    if isinstance(changed, LoopTimers):
                        self._drop()
                    elif changed.callback is None:
                        self._queue.discard(changed)
                    elif changed.owner.open:
                        self._queue.set(changed, changed.when)
                    self._changed.popleft()
                if (due := self._queue.due()) < self._armed_for:
                    self._arm(due)
            finally:
                self._busy = False
            if not self._changed:
                return

    def _drop(self) -> None:
        for timer in [each for each in self._queue if not each.owner.open]:
            timer.callback = None
            self._queue.discard(timer)
        if not self._queue:
            self._disarm()
            self._armed_for, self._disarm = math.inf, lambda: None

    def _arm(self, due: float) -> None:
        delay = min(max(due - self._now(), 0.0), _MAX_DELAY)
        disarm: Callable[[], object]
        try:
            # In a new context, because the caller's holds a trace and other variables.
            if self._is_asyncio and isinstance(self._clock, SystemClock):
                disarm = self.loop.call_later(delay, self._fire, due, context=Context()).cancel
            else:
                disarm = Context().run(self._sleep, due, self._now() + delay)
        except RuntimeError:
            self._queue.clear()  # The loop is closed, as in `_wake`.
            return
        self._disarm()
        self._armed_for, self._disarm = due, disarm

    def _sleep(self, due: float, until: float) -> Callable[[], None]:
        async def sleep() -> None:
            await self._clock.sleep_until(until)
            self._fire(due)

        return spawn(sleep())

    def _fire(self, due: float) -> None:
        if due == self._armed_for:
            self._armed_for, self._disarm = math.inf, lambda: None
        if self._busy:
            return
        self._busy = True
        try:
            # If a callback schedules a timer for now, it stays in the deque, so that other tasks can run first.
            for timer in self._queue.expire(self._now()):
                self._call(timer)
        finally:
            self._busy = False
            self._settle()

    def _call(self, timer: Timer) -> None:
        callback, timer.callback = timer.callback, None
        if callback is None or not timer.owner.open:
            return
        try:
            callback()
        except Exception as error:
            timer.owner.failures += 1
            function = getattr(callback, "func", callback)
            kind = (getattr(function, "__code__", function.__class__), type(error))
            if kind not in self._logged and len(self._logged) < _LOGGED:
                self._logged.add(kind)
                logger.exception("a timer callback failed")


def _current_loop() -> Any:
    """Return the asyncio loop that runs in this thread, or the token of the trio run. Raises `RuntimeError`."""
    if (loop := running_loop()) is not None:
        return loop
    import trio

    return trio.lowlevel.current_trio_token()


_here = threading.local()  # `queue` belongs to the loop that this thread used last.


def _queue_of_running_loop(clock: Clock) -> _LoopQueue:
    if not isinstance(clock, SystemClock):
        return _LoopQueue(clock)
    queue: _LoopQueue | None = getattr(_here, "queue", None)
    if queue is None or queue.loop is not _current_loop():
        queue = _here.queue = _LoopQueue(clock)
    return queue


def running_timers(clock: Clock = SYSTEM_CLOCK) -> LoopTimers:
    """Return timers on the event loop that runs in this thread."""
    timers = LoopTimers(clock)
    timers.start()
    return timers
