"""Flights: one load for everybody in this process who asks for the same key meanwhile.

Who waits for whom is kept as a graph, so that loaders that would wait for each other for ever are told so.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from typing import Any, Final

from cachebus.bus import Port, ThreadPort, open_port
from cachebus.messages import CacheError


class _Outcome:
    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


ABANDONED: Final = _Outcome("ABANDONED")
"""The outcome of a load that was broken off: whoever waits must ask again."""

LATE: Final = _Outcome("LATE")
"""In the place of an outcome: whoever waits does so no longer."""


LEFT_OUT: Final = _Outcome("LEFT_OUT")
"""The outcome for a key that a loader of many brought no value for."""


class Value:
    """The outcome of a load that brought a value.

    `shared` is false if something it depends on was invalidated meanwhile, in a way that only the loader knew of:
    who joined in later than the load began must ask again.
    """

    __slots__ = ("shared", "value")

    def __init__(self, value: Any, *, shared: bool = True) -> None:
        self.value = value
        self.shared = shared


class Values:
    """The outcomes of a load of many keys."""

    __slots__ = ("by_key",)

    def __init__(self, by_key: Mapping[str, Any]) -> None:
        self.by_key = by_key

    def of(self, key: str) -> Any:
        """The outcome for one of the keys."""
        return self.by_key.get(key, LEFT_OUT)


class Raised:
    """The outcome of a load that failed. What is no `Exception`, such as a `SystemExit`, is raised to the caller who began
    the load only; the others must ask again."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def concerns(self, *, leads: bool) -> bool:
        """Whether it is for a caller who began the load, or for one who did not."""
        return leads or isinstance(self.error, Exception)


class Load:
    """The call of one loader: a node of the wait-for graph. `thread` is where it runs, or where its event loop does."""

    __slots__ = ("landed", "thread", "waits_for")

    landed: bool
    """Whether there is an outcome."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.landed = False
        self.waits_for: dict[Load, int] = {}


class _Graph:
    """The guard of the wait-for graph. A child of a fork begins with another one: whoever held it is not there to give it
    back."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self.guard = threading.Lock()


_graph = _Graph()
_loading: ContextVar[tuple[Load, ...]] = ContextVar("loading", default=())


def loads_of_this_context() -> tuple[Load, ...]:
    """The loads on whose behalf the present task or thread works, outermost first."""
    return _loading.get()


class OnBehalfOf:
    """Work for these loads, so that their loader can be told from others: a context manager."""

    # Not made of a generator, which would take four times as long.

    __slots__ = ("_loads", "_token")

    def __init__(self, loads: tuple[Load, ...]) -> None:
        self._loads = loads

    def __enter__(self) -> None:
        self._token = _loading.set(self._loads)

    def __exit__(self, *exc_info: object) -> None:
        _loading.reset(self._token)


class _Waiting:
    """The time in which the present context waits for a load. Raises `CacheError` where that load waits for it."""

    __slots__ = ("_chain", "_for", "_me")

    def __init__(self, load: Load) -> None:
        self._for = load
        loads = _loading.get()
        self._chain = [each for each in loads if not each.landed] if loads else loads
        self._me = self._chain[-1] if self._chain else None

    def __enter__(self) -> None:
        me = self._me
        if me is None:
            return
        with _graph.guard:
            if self._for in self._chain:
                raise CacheError("a loader asks for the very key that it is loading, and would wait for itself")
            if _reaches(self._for, me):
                raise CacheError("a loader asks for a key whose loader waits for it: they would wait for ever")
            me.waits_for[self._for] = me.waits_for.get(self._for, 0) + 1

    def __exit__(self, *exc_info: object) -> None:
        if self._me is not None:
            with _graph.guard:
                self._me.waits_for[self._for] -= 1
                if not self._me.waits_for[self._for]:
                    del self._me.waits_for[self._for]


def _reaches(start: Load, goal: Load) -> bool:
    seen: set[Load] = set()
    waiting = [start]
    while waiting:
        load = waiting.pop()
        if load is goal:
            return True
        if load not in seen:
            seen.add(load)
            waiting.extend(load.waits_for)
    return False


class Flight(Load):
    """What everybody waits for who wants the value of one load. Tasks of any event loop and threads may wait.

    When the last of them stops waiting, `cancel` is called, unless one of them has said that the load shall go on. `names`
    are those of the leases that it loads under, or waits for.
    """

    __slots__ = ("_guard", "_kept", "_outcome", "_ports", "cancel", "names")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.waits_for = {}
        self.landed = False
        self.cancel: Callable[[], None] | None = None
        self.names: Collection[str] = ()
        self._guard = threading.Lock()
        self._ports: dict[Port, None] = {}
        self._kept = False
        self._outcome: Any = None

    def keep(self) -> None:
        """Let the load go on when nobody waits for it any more."""
        self._kept = True

    async def wait(
        self, timeout: float | None = None, *, keep: bool = False, begin: Callable[[], None] | None = None
    ) -> Any:
        """The outcome, or `LATE` after `timeout` seconds; with `keep` the load goes on all the same then. `begin` is
        called once the caller counts as waiting."""
        with _Waiting(self):
            if begin is not None and not self._begin(begin):
                return self._outcome
            port = open_port()
            try:
                if not self._board(port):
                    return self._outcome
                if begin is not None:
                    self._leave(_LEADER)
                outcome = await port.wait(timeout, lambda: LATE)
                self._kept = self._kept or (keep and outcome is LATE)
                return outcome
            finally:
                self._leave(port)

    def wait_in_thread(
        self, timeout: float | None = None, *, keep: bool = False, begin: Callable[[], None] | None = None
    ) -> Any:
        """As `wait`, blocking this thread. Raises `CacheError` if it is the thread that loads."""
        with _Waiting(self):
            if begin is None and self.thread == threading.get_ident() and not self.landed:
                raise CacheError(
                    "the key is being loaded by a task of this very thread, which a blocking call would stop;"
                    " await a coroutine function, or call from another thread"
                )
            if begin is not None and not self._begin(begin):
                return self._outcome
            port = ThreadPort()
            try:
                if not self._board(port):
                    return self._outcome
                if begin is not None:
                    self._leave(_LEADER)
                outcome = port.wait(timeout, lambda: LATE)
                self._kept = self._kept or (keep and outcome is LATE)
                return outcome
            finally:
                self._leave(port)

    def land(self, outcome: Any) -> None:
        """Give everybody who waits the outcome. Only the first one counts."""
        with self._guard:
            if self.landed:
                return
            self.landed = True
            self._outcome = outcome
        for port in self._ports:
            port.answer(outcome)

    def _begin(self, begin: Callable[[], None]) -> bool:
        """Begin the load with the caller among those who wait; says whether there is still something to wait for."""
        # By a stand-in: a load that ends at once, as a plain one does in its caller's thread, needs no port.
        if not self._board(_LEADER):
            return False
        try:
            begin()
        except BaseException:
            self._leave(_LEADER)
            raise
        return not self.landed

    def _board(self, port: Port) -> bool:
        with self._guard:
            if not self.landed:
                self._ports[port] = None
                return True
        return False

    def _leave(self, port: Port) -> None:
        if self.landed:
            return
        with self._guard:
            if self.landed:
                return
            del self._ports[port]
            forsaken = not self._ports and not self._kept
        if forsaken and self.cancel is not None:
            self.cancel()


class _Leader:
    """In the place of a port: of the caller who begins a load, until there is something to wait for."""

    waiting = False

    def answer(self, reply: Any) -> None:
        """Nothing to do: the caller looks for the outcome itself."""


_LEADER: Final = _Leader()
