"""Single flight: concurrent callers in one process share one load.

A graph records which loads wait for which. A loader whose wait would close a cycle gets an error instead of a deadlock.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from typing import Any, Final

from msgspec import Struct, field

from cachebus.bus import ReplyPort, ThreadPort, open_port
from cachebus.client.background_loop import PerProcess
from cachebus.messages import CacheError


class _Outcome(Struct, frozen=True):
    name: str


CANCELLED: Final = _Outcome("CANCELLED")
"""Outcome of a load that was cancelled. Its waiters must ask the backend again."""

TIMED_OUT: Final = _Outcome("TIMED_OUT")
"""Result of a wait that timed out before the load had an outcome."""

LEFT_OUT: Final = _Outcome("LEFT_OUT")
"""Outcome for a key that is missing from the result of a loader of many keys."""


class Value(Struct, frozen=True):
    """Outcome of a load that returned a value.

    `shared` is false if the loader added a tag that may have been invalidated during the load. Callers that joined
    after the load began must then ask the backend again.
    """

    value: Any
    shared: bool = True


class Values(Struct, frozen=True):
    """Outcomes of a load of many keys."""

    by_key: Mapping[str, Any]


class Raised(Struct, frozen=True):
    """Outcome of a load that failed.

    An error that is not an `Exception`, such as `SystemExit`, is raised only in the caller that started the load. The
    others must ask the backend again.
    """

    error: BaseException

    def concerns(self, *, is_leader: bool) -> bool:
        """Return True if this caller must raise the error."""
        return is_leader or isinstance(self.error, Exception)


class InFlightLoad(Struct, eq=False, kw_only=True):
    """A load that is in progress. Callers wait for it as tasks of any event loop, or as threads.

    When the last waiter is removed, `cancel` is called unless the load is `kept`. `lease_names` are the leases that it
    loads under or waits for. `thread` is the thread that runs it or its event loop. `owner` is the coroutine that will
    resolve it. `waits_for` counts the waits of its loader for other loads.
    """

    resolved: bool = False
    waits_for: dict[InFlightLoad, int] = field(default_factory=dict)
    owner: Coroutine[Any, Any, Any] | None = None
    outcome: Any = None
    cancel: Callable[[], None] | None = None
    kept: bool = False
    lease_names: set[str] = field(default_factory=set)
    thread: int = field(default_factory=threading.get_ident)
    _guard: threading.Lock = field(default_factory=threading.Lock)
    _waiters: dict[ReplyPort, None] = field(default_factory=dict)
    _starting: bool = False

    @property
    def waiters(self) -> int:
        """Number of waiting callers, including the leader."""
        return len(self._waiters) + self._starting

    def is_orphan(self) -> bool:
        """Return True if the owner ended without resolving the load, as after an interrupt."""
        owner = self.owner
        return owner is not None and not self.resolved and inspect.getcoroutinestate(owner) == inspect.CORO_CLOSED

    async def wait(
        self,
        timeout: float | None = None,
        *,
        keep: bool = False,
        start: Callable[[], None] | None = None,
        blocking: bool = False,
    ) -> Any:
        """Wait for the outcome and return it, or `TIMED_OUT` after `timeout` seconds.

        With `keep`, the load continues after a timeout. `start` makes the caller the leader: it is called to start the
        load, while the caller counts as a waiter. `blocking` blocks the thread instead of suspending, and raises
        `CacheError` in the thread that runs the load.
        """
        loads = CURRENT_LOADS.get()
        waiting = _add_edge(loads, self) if loads else None
        try:
            if start is not None:
                self._starting = True
                start()
                if self.resolved:  # Resolved by `start`, so no port is needed.
                    return self.outcome
            elif blocking and self.thread == threading.get_ident() and not self.resolved:
                raise CacheError(
                    "the key is being loaded by a task of this thread, which a blocking call would block;"
                    " await a coroutine function, or call from another thread"
                )
            port = ThreadPort() if blocking else open_port()
            try:
                with self._guard:
                    if self.resolved:
                        return self.outcome
                    self._waiters[port] = None
                if start is not None:
                    self._starting = False
                outcome: Any = port.wait(timeout, lambda: TIMED_OUT)
                if not blocking:
                    outcome = await outcome
                self.kept = self.kept or (keep and outcome is TIMED_OUT)
                return outcome
            finally:
                if not self.resolved:
                    self.remove_waiter(port)
        finally:
            if waiting is not None:
                _remove_edge(waiting, self)

    def remove_waiter(self, port: ReplyPort) -> None:
        """Remove a waiter. If it was the last one, cancel the load, unless it is `kept`."""
        with self._guard:
            self._waiters.pop(port, None)
            abandoned = not (self.resolved or self._waiters or self.kept or self._starting)
        if abandoned and self.cancel is not None:
            self.cancel()

    def resolve(self, outcome: Any) -> None:
        """Set the outcome and wake every waiter. Only the first outcome counts; an interrupted call may be repeated."""
        with self._guard:
            if not self.resolved:
                self.outcome = outcome
                self.resolved = True
        outcome = self.outcome
        for port in tuple(self._waiters):
            port.answer(outcome)
            self._waiters.pop(port, None)


CURRENT_LOADS: ContextVar[tuple[InFlightLoad, ...]] = ContextVar("loads", default=())
"""Loads that the current task or thread is working on, outermost first."""


_graph = PerProcess(threading.Lock)


def _add_edge(loads: tuple[InFlightLoad, ...], awaited: InFlightLoad) -> InFlightLoad | None:
    """Record that the innermost unresolved load of `loads` waits for `awaited`, and return that load.

    Raises `CacheError` if the wait would be a deadlock.
    """
    chain = [each for each in loads if not each.resolved]
    if not chain:
        return None
    waiting = chain[-1]
    with _graph.value:
        if awaited in chain:
            raise CacheError("a loader requested the key that it is loading, and would wait for itself")
        if _reaches(awaited, waiting):
            raise CacheError("a loader requested a key whose loader is waiting for it, which would be a deadlock")
        waiting.waits_for[awaited] = waiting.waits_for.get(awaited, 0) + 1
    return waiting


def _remove_edge(waiting: InFlightLoad, awaited: InFlightLoad) -> None:
    """Undo `_add_edge`."""
    with _graph.value:
        left = waiting.waits_for.get(awaited, 0) - 1
        if left > 0:
            waiting.waits_for[awaited] = left
        else:
            waiting.waits_for.pop(awaited, None)


def _reaches(start: InFlightLoad, goal: InFlightLoad) -> bool:
    visited: set[InFlightLoad] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        if node is goal:
            return True
        if node not in visited and not node.resolved:
            visited.add(node)
            pending.extend(node.waits_for)
    return False
