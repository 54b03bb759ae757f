"""Timers: functions that are called back on an event loop when they are due, with one queue for each loop.

An event loop has one timer of its own, for the first of ours that is due. A timer that is armed or cancelled on another
thread, or by a finalizer in the middle of the queue's own work, is appended to a deque and taken over by the loop. No
lock is held, so neither side waits for the other:

    loop                                    another thread
    ----                                    --------------
    take over what is in the deque          append to the deque
    arm the loop's timer, note for when     due before what is noted: wake the loop
    look into the deque once more
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

_SLACK = 64  # Dead places that a heap may have in any case.
_BACKLOG = 1000  # Changes by other threads that may wait for the loop's next step before it is woken.
_LONGEST = 86400.0  # Seconds for which the loop's timer is armed at most; then it is armed again.
_LOGGED = 100  # Kinds of failures of callbacks that are logged, at most; the others are counted.


class TimerQueue(Generic[K]):
    """A priority queue of keys, each with the one instant at which it is due. Not for use by several threads at once.

    The heap is lazy: to move a key to a later instant, or to discard it, changes a dictionary only. Its old place is
    dropped when it comes up, or when more than half of the heap is such places, so the heap is bounded by twice the
    number of keys. Keys that are due at the same instant come in the order in which they were set.
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
        """Let a key be due at `when`, in place of an earlier setting. Return whether none is due earlier than it."""
        before = self._due.get(key)
        self._due[key] = when
        if before is not None and before <= when:
            return False  # Its place in the heap comes up earlier, and it is moved then.
        heapq.heappush(self._heap, (when, next(self._numbers), key))
        self._tidy()
        return self._heap[0][0] >= when

    def set_earlier(self, key: K, when: float) -> bool:
        """As `set`, unless the key is due by then already."""
        before = self._due.get(key)
        return (before is None or when < before) and self.set(key, when)

    def discard(self, key: K) -> None:
        """Take a key out, if it is in the queue."""
        if self._due.pop(key, None) is not None:
            self._tidy()

    def due(self) -> float:
        """The instant at which to look for what is due: the earliest one, or earlier if a key was moved; else infinity."""
        heap, due = self._heap, self._due
        while heap:
            when, _, key = heap[0]
            if key in due:
                return when
            heapq.heappop(heap)
        return math.inf

    def pop(self, now: float) -> K | None:
        """Take out the first key that is due at `now`; `None` if none is."""
        return next(self.expire(now), None)

    def expire(self, now: float, limit: float = math.inf) -> Iterator[K]:
        """Take out each key that is due at `now`, the earliest first. Looks at no more than `limit` keys."""
        heap, due = self._heap, self._due
        while heap and heap[0][0] <= now and limit > 0:
            noted, number, key = heap[0]
            when = due.get(key)
            if when is None or when < noted:
                heapq.heappop(heap)
            elif when > noted:
                heapq.heapreplace(heap, (when, number, key))
                limit -= when > now  # Otherwise it is counted when it is taken out.
            else:
                limit -= 1
                heapq.heappop(heap)
                del due[key]
                yield key

    def clear(self) -> None:
        """Take everything out."""
        self._due.clear()
        self._heap.clear()

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._due) + _SLACK:
            # In place, because `expire` may be under way.
            self._heap[:] = [(when, number, key) for number, (key, when) in enumerate(self._due.items())]
            heapq.heapify(self._heap)
            self._numbers = itertools.count(len(self._heap))


class Timer(Struct, eq=False):
    """A function that will be called back at `when`, unless it is cancelled."""

    loop: _LoopQueue | None
    owner: LoopTimers
    when: float
    callback: Callable[[], Any] | None

    def __repr__(self) -> str:
        return f"<Timer at {self.when:g} s{', over' if self.callback is None else ''}>"

    def cancel(self) -> None:
        """Do not call back. From any thread; once it was called back or cancelled, this does nothing."""
        if self.callback is not None:
            self.callback = None
            if self.loop is not None:
                self.loop.change(self, self.when)


class LoopTimers:
    """The timers of one owner on an event loop, with times on `clock.monotonic`. Implements `Timers`.

    `start` binds them to the running loop. Before that, and after `close`, nothing is called back. The owners on a loop
    share one queue, except those with a clock of their own. A callback must not wait. Its errors are logged, once for
    each kind, and counted in `failures`.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._now = clock.monotonic
        self._loop: _LoopQueue | None = None
        self.open = False
        self.failures = 0

    def __repr__(self) -> str:
        return f"<LoopTimers {'open' if self.open else 'closed'}, {len(self)} armed>"

    def __len__(self) -> int:
        return 0 if self._loop is None else self._loop.count(self)

    def start(self) -> None:
        """Begin, on the event loop that runs in this thread."""
        self._loop = _queue_of_running_loop(self._clock)
        self.open = True

    def call_at(self, when: float, callback: Callable[[], Any]) -> Timer:
        """Call `callback` when `clock.monotonic` has reached `when`. From any thread, finalizers included."""
        if when != when:
            raise ValueError(f"a timer needs an instant, not {when!r}")
        loop = self._loop
        timer = Timer(loop, self, when, callback)
        if loop is None or not self.open:
            timer.callback = None
        else:
            loop.change(timer, when)
        return timer

    def call_after(self, delay: float, callback: Callable[[], Any]) -> Timer:
        """As `call_at`, `delay` seconds from now."""
        return self.call_at(self._now() + delay, callback)

    def close(self) -> None:
        """Cancel everything. Safe to call twice, and on any thread."""
        self.open = False
        if self._loop is not None:
            self._loop.change(self, -math.inf)

    def forked(self) -> None:
        """Become unusable in the child of a fork, whose loop stayed behind."""
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
        """How many timers an owner has; on the loop's own thread."""
        self._settle()
        return sum(each.owner is owner for each in self._queue)

    def change(self, changed: Timer | LoopTimers, when: float) -> None:
        """Take over a timer that was armed or cancelled, or the end of an owner. `when` is how urgent that is."""
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
            # The loop is closed, and nothing is called back any more.
            self._changed.clear()
            self._waking = False

    def _settle(self) -> None:
        """Take over what has changed, and arm the loop's timer for the first that is due."""
        if self._busy:
            return  # The call further down this stack looks once more.
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
        delay = min(max(due - self._now(), 0.0), _LONGEST)
        disarm: Callable[[], object]
        try:
            # In a context of its own: that of the caller holds a trace, and much else.
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
            # A timer that a callback arms for now waits in the deque, so that other tasks have their turn.
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
                logger.exception("the callback of a timer failed")


def _current_loop() -> Any:
    """The loop of asyncio that runs in this thread, or the token of the run of trio. Raises `RuntimeError`."""
    if (loop := running_loop()) is not None:
        return loop
    import trio

    return trio.lowlevel.current_trio_token()


_here = threading.local()  # `queue` is that of the loop that this thread used last.


def _queue_of_running_loop(clock: Clock) -> _LoopQueue:
    if not isinstance(clock, SystemClock):
        return _LoopQueue(clock)
    queue: _LoopQueue | None = getattr(_here, "queue", None)
    if queue is None or queue.loop is not _current_loop():
        queue = _here.queue = _LoopQueue(clock)
    return queue


def running_timers(clock: Clock = SYSTEM_CLOCK) -> LoopTimers:
    """Timers on the event loop that runs in this thread."""
    timers = LoopTimers(clock)
    timers.start()
    return timers
