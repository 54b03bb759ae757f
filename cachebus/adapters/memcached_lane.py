"""The way to one Memcached server: one batch at a time in a worker thread, so that their order holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import anyio
from anyio import to_thread

from cachebus.messages import CacheClosed, CacheConnectionError, CacheError

from .memcached_connection import Connection, Dial, Place
from .memcached_errors import BACKEND

Work = Callable[[Connection], Any]


class _Job:
    """One piece of work in a thread, and who closes the connection when nobody waits for it any more."""

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self._guard = threading.Lock()
        self._abandoned = False
        self._finished = False

    def begin(self, connection: Connection) -> None:
        """Say which connection is in use. Raises `CacheConnectionError` if nobody waits any more."""
        with self._guard:
            self.connection = connection
            if self._abandoned:
                connection.close()
                raise CacheConnectionError("the batch was given up", BACKEND)

    def finish(self) -> None:
        """Called by the thread, last of all."""
        with self._guard:
            self._finished = True
            if self._abandoned and self.connection is not None:
                self.connection.close()

    def abandon(self) -> None:
        """Called by the event loop: the thread shall come to an end."""
        with self._guard:
            self._abandoned = True
            if self.connection is None:
                return  # Still connecting, which ends by itself.
            if self._finished:
                self.connection.close()
            else:
                self.connection.shut()


class Lane:
    """A server, the connection to it, and at most `most` threads that deal with it: one that works, and those of batches
    that were given up while a name was looked up or a connection was made, which nothing can hurry.

    With `cautious`, a server that could not be reached is left alone for as long as the attempt took, so that one of
    several that answers nothing does not hold up the others' keys.
    """

    def __init__(self, place: Place, dial: Dial, most: int, *, cautious: bool) -> None:
        self.place = place
        self.connection: Connection | None = None
        self._dial = dial
        self._most = most
        self._cautious = cautious
        self._turn = anyio.Lock()
        self._threads = anyio.CapacityLimiter(most)
        self._closed = False
        self._refused: CacheError | None = None
        self._again_at = 0.0

    def __repr__(self) -> str:
        return f"<Lane to {self.place}, {self._threads.borrowed_tokens}/{self._most} threads>"

    async def run(self, work: Work) -> Any:
        """What `work` makes of the connection. Work is done in the order in which it comes.

        Raises `CacheConnectionError` when there is no connection. Cancelled, it breaks the work off.
        """
        async with self._turn:
            if self._closed:
                raise CacheClosed("the connection to memcached was closed")
            if self._threads.available_tokens < 1:
                raise CacheConnectionError(
                    f"{self._most} threads wait for {self.place}, which is all there may be", BACKEND
                )
            if self._refused is not None and self._dial.clock.monotonic() < self._again_at:
                raise self._refused
            job = _Job()
            try:
                return await to_thread.run_sync(
                    self._carry_out, job, work, abandon_on_cancel=True, limiter=self._threads
                )
            except BaseException as error:
                if not isinstance(error, CacheError):
                    self.connection = None
                    job.abandon()
                raise

    async def close(self) -> None:
        """Finish what is under way, then close. Cancelled, it closes at once."""
        try:
            async with self._turn:
                pass
        finally:
            self._closed = True
            if self.connection is not None:
                self.connection.close()
                self.connection = None

    def _carry_out(self, job: _Job, work: Work) -> Any:
        """In a worker thread."""
        try:
            connection = self.connection
            if connection is None or connection.lost:
                connection = self._connect()
                job.begin(connection)
                self.connection = connection
            else:
                job.begin(connection)
            return work(connection)
        finally:
            job.finish()

    def _connect(self) -> Connection:
        now = self._dial.clock.monotonic
        started = now()
        try:
            connection = self._dial.connect(self.place)
        except CacheError as error:
            if self._cautious:
                self._refused, self._again_at = error, 2 * now() - started
            raise
        self._refused = None
        return connection


def common(lanes: Sequence[Lane], what: Callable[[Connection], int]) -> int | None:
    """The smallest of what the connected servers say; `None` if none is connected."""
    return min((what(lane.connection) for lane in lanes if lane.connection is not None), default=None)
