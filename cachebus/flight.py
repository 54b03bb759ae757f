"""Flights: one load for everybody in this process who asks for the same key meanwhile."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any, Final

from cachebus.bus import Port, ThreadPort, open_port
from cachebus.messages import CacheError

_loading: ContextVar[tuple[Flight, ...]] = ContextVar("loading", default=())


class _Abandoned:
    """The outcome of a load whose caller was cancelled: somebody else must load."""


ABANDONED: Final = _Abandoned()


class Flight:
    """One load under way: its leader lands it, everybody else waits. Tasks of any event loop and threads may wait."""

    __slots__ = ("_guard", "_landed", "_outcome", "_ports", "_thread")

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._guard = threading.Lock()
        self._ports: list[Port] = []
        self._landed = False
        self._outcome: Any = None

    async def wait(self) -> Any:
        """The value that the leader loaded, or `ABANDONED`. Raises what the loader raised."""
        port = open_port()
        return _unpack(await port.wait() if self._board(port) else self._outcome)

    def wait_in_thread(self) -> Any:
        """As `wait`, blocking this thread. Raises `CacheError` if it is the thread that loads."""
        if self._thread == threading.get_ident() and not self._landed and self not in _loading.get():
            raise CacheError(
                "the key is being loaded by a task of this very thread, which a blocking call would stop;"
                " await a coroutine function, or call from another thread"
            )
        port = ThreadPort()
        return _unpack(port.wait() if self._board(port) else self._outcome)

    def land(self, outcome: Any) -> None:
        """Give everybody who waits the value, `ABANDONED`, or the exception to raise in a `Raised`."""
        with self._guard:
            self._landed = True
            self._outcome = outcome
        for port in self._ports:
            port.answer(outcome)

    def _board(self, port: Port) -> bool:
        if self in _loading.get():
            raise CacheError("a loader asks for the very key that it is loading, and would wait for itself")
        with self._guard:
            if not self._landed:
                self._ports.append(port)
                return True
        return False


class Raised:
    """The outcome of a load that failed."""

    __slots__ = ("error",)

    def __init__(self, error: Exception) -> None:
        self.error = error


class Leading:
    """The time in which a task or thread loads for a flight, so that its loader can be told from others."""

    __slots__ = ("_flight", "_token")

    def __init__(self, flight: Flight) -> None:
        self._flight = flight

    def __enter__(self) -> None:
        self._token = _loading.set((*_loading.get(), self._flight))

    def __exit__(self, *exc_info: object) -> None:
        _loading.reset(self._token)


def _unpack(outcome: Any) -> Any:
    if isinstance(outcome, Raised):
        raise outcome.error
    return outcome
