"""Single flight: the callers of one process who want the value of one load share it.

Loaders that would wait for each other forever get an error instead: the loads form a graph of which waits for which.
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
"""The outcome of a load that was broken off: its waiters must ask again."""

TIMED_OUT: Final = _Outcome("TIMED_OUT")
"""In the place of an outcome: the caller stops waiting."""

LEFT_OUT: Final = _Outcome("LEFT_OUT")
"""The outcome for a key that a loader of many returned no value for."""


class Value(Struct, frozen=True):
    """The outcome of a load that returned a value.

    `shared` is false if a tag that only the loader named may have been invalidated during the load. Callers who joined after the
    load began must ask again then.
    """

    value: Any
    shared: bool = True


class Values(Struct, frozen=True):
    """The outcomes of a load of many keys."""

    by_key: Mapping[str, Any]


class Raised(Struct, frozen=True):
    """The outcome of a load that failed. An error that is no `Exception`, such as a `SystemExit`, is raised only to the
    caller who began the load; the others must ask again."""

    error: BaseException

    def concerns(self, *, is_leader: bool) -> bool:
        """Return whether the error is for this caller."""
        return is_leader or isinstance(self.error, Exception)


class InFlightLoad(Struct, eq=False, kw_only=True):
    """A load that callers wait for, as tasks of any event loop or as threads.

    When the last waiter leaves, `cancel` is called, unless the load is to be `kept`. `lease_names` are the leases
    that it loads under or waits for. `thread` is where it runs, or where its event loop does. `owner` is the coroutine that
    will resolve it. `waits_for` counts the waits of its loader for other loads.
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
        """The number of callers who wait, the leader included."""
        return len(self._waiters) + self._starting

    def is_orphan(self) -> bool:
        """Return whether the owner ended without resolving the load, as an interrupted thread may."""
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
        """Return the outcome, or `TIMED_OUT` after `timeout` seconds. With `keep` the load goes on after a timeout.

        `start` makes the caller the leader: it is called to start the load, while the caller counts as a waiter. `blocking` stops
        the thread instead of suspending; in the thread that loads that is a `CacheError`.
        """
        loads = CURRENT_LOADS.get()
        waiting = _add_edge(loads, self) if loads else None
        try:
            if start is not None:
                self._starting = True
                start()
                if self.resolved:  # At once: then there is no need for a port.
                    return self.outcome
            elif blocking and self.thread == threading.get_ident() and not self.resolved:
                raise CacheError(
                    "the key is being loaded by a task of this very thread, which a blocking call would stop;"
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
        """Forget a waiter; without any other the load is cancelled, unless it is to go on."""
        with self._guard:
            self._waiters.pop(port, None)
            forsaken = not (self.resolved or self._waiters or self.kept or self._starting)
        if forsaken and self.cancel is not None:
            self.cancel()

    def resolve(self, outcome: Any) -> None:
        """Give every waiter the outcome. Only the first one counts; a call that was interrupted may be repeated."""
        with self._guard:
            if not self.resolved:
                self.outcome = outcome
                self.resolved = True
        outcome = self.outcome
        for port in tuple(self._waiters):
            port.answer(outcome)
            self._waiters.pop(port, None)


CURRENT_LOADS: ContextVar[tuple[InFlightLoad, ...]] = ContextVar("loads", default=())
"""The loads on whose behalf the current task or thread works, outermost first."""


_graph = PerProcess(threading.Lock)


def _add_edge(loads: tuple[InFlightLoad, ...], awaited: InFlightLoad) -> InFlightLoad | None:
    """Note that the innermost of the unresolved `loads` waits for `awaited`, and return that load.

    Raises `CacheError` if the wait would never end.
    """
    chain = [each for each in loads if not each.resolved]
    if not chain:
        return None
    waiting = chain[-1]
    with _graph.value:
        if awaited in chain:
            raise CacheError("a loader asks for the very key that it is loading, and would wait for itself")
        if _reaches(awaited, waiting):
            raise CacheError("a loader asks for a key whose loader waits for it: they would wait for ever")
        waiting.waits_for[awaited] = waiting.waits_for.get(awaited, 0) + 1
    return waiting


def _remove_edge(waiting: InFlightLoad, awaited: InFlightLoad) -> None:
    """Take back what `_add_edge` noted."""
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
