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

    def __init__(self, connection: Connection | None) -> None:
        self.connection = connection
        self.refused_after: float | None = None
        self._guard = threading.Lock()
        self._abandoned = False
        self._running = False

    def begin(self) -> None:
        """The thread runs. Raises `CacheConnectionError` if nobody waits any more."""
        with self._guard:
            self._check()
            self._running = True

    def connected(self, connection: Connection) -> None:
        """The thread has made a connection. Raises `CacheConnectionError` if nobody waits any more."""
        with self._guard:
            self.connection = connection
            self._check()

    def finish(self) -> None:
        """The thread is done."""
        with self._guard:
            self._running = False
            if self._abandoned and self.connection is not None:
                self.connection.close()

    def abandon(self) -> bool:
        """Nobody waits any more: the thread shall come to an end. `True` if it is not at work, and now never will be."""
        with self._guard:
            self._abandoned = True
            if self._running and self.connection is not None:
                self.connection.shut()
            return not self._running

    def _check(self) -> None:
        if self._abandoned:
            raise CacheConnectionError("the batch was given up", BACKEND)


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
            job = _Job(None if self.connection is None or self.connection.lost else self.connection)
            try:
                result = await to_thread.run_sync(
                    self._carry_out, job, work, abandon_on_cancel=True, limiter=self._threads
                )
            except CacheError as error:
                self.connection = job.connection
                if job.refused_after is not None and self._cautious:
                    self._refused, self._again_at = error, self._dial.clock.monotonic() + job.refused_after
                raise
            except BaseException:
                # A thread that is at work closes its connection when it finds that it was given up.
                self.connection = job.connection if job.abandon() else None
                raise
            self.connection, self._refused = job.connection, None
            return result

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
        job.begin()
        try:
            if job.connection is None:
                job.connected(self._connect(job))
            assert job.connection is not None
            return work(job.connection)
        finally:
            job.finish()

    def _connect(self, job: _Job) -> Connection:
        now = self._dial.clock.monotonic
        started = now()
        try:
            return self._dial.connect(self.place)
        except CacheError:
            job.refused_after = now() - started
            raise


def common(lanes: Sequence[Lane], what: Callable[[Connection], int]) -> int | None:
    """The smallest of what the connected servers say; `None` if none is connected."""
    return min((what(lane.connection) for lane in lanes if lane.connection is not None), default=None)
