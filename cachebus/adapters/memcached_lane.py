"""The way to one Memcached server: one batch at a time, so that their order holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import anyio
from anyio import to_thread

from cachebus.messages import CacheClosed, CacheConnectionError, CacheError

from .memcached_connection import Connection, Dial, Place, Talk
from .memcached_errors import BACKEND

T = TypeVar("T")


class _Attempt:
    """One attempt to connect, in a thread, and who closes the connection when nobody waits for it any more."""

    def __init__(self, dial: Dial, place: Place) -> None:
        self._dial = dial
        self._place = place
        self._guard = threading.Lock()
        self._made: Connection | None = None
        self._abandoned = False

    def connect(self) -> Connection:
        """Called by the thread."""
        made = self._dial.connect(self._place)
        with self._guard:
            self._made = made
            if self._abandoned:
                made.close()
        return made

    def abandon(self) -> None:
        """Called by the event loop."""
        with self._guard:
            self._abandoned = True
            if self._made is not None:
                self._made.close()


class Lane:
    """A server, the connection to it, and at most `most` threads that connect to it: one for whoever waits, the others
    those of batches that were given up while a name was looked up, which nothing can hurry.

    With `cautious`, a server that could not be reached is left alone for as long as the attempt took, so that one of
    several that answers nothing does not hold up the others' keys.
    """

    def __init__(self, place: Place, dial: Dial, most: int, *, cautious: bool) -> None:
        self.place = place
        self.connection: Connection | None = None
        self._dial = dial
        self._most = most
        self._cautious = cautious
        self._turn = anyio.Lock(fast_acquire=True)
        self._threads = anyio.CapacityLimiter(most)
        self._closed = False
        self._refused: CacheError | None = None
        self._again_at = 0.0

    def __repr__(self) -> str:
        return f"<Lane to {self.place}, {self._threads.borrowed_tokens}/{self._most} threads>"

    async def run(self, talk: Callable[[Connection], Talk[T]]) -> T:
        """What a talk over the connection comes to. Talks are held in the order in which they come.

        Raises `CacheConnectionError` when there is no connection. Cancelled, it breaks the talk off and the connection.
        """
        async with self._turn:
            if self._closed:
                raise CacheClosed("the connection to memcached was closed")
            connection = self.connection
            if connection is None or connection.lost:
                connection = self.connection = await self._connect()
            elif connection.out_of_sync:
                await self._resync(connection)
            return await connection.converse(talk(connection))

    async def connect(self) -> None:
        """Make the connection, unless there is one. Raises `CacheConnectionError`."""
        async with self._turn:
            if self.connection is None or self.connection.lost:
                self.connection = await self._connect()

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

    async def _connect(self) -> Connection:
        now = self._dial.clock.monotonic
        started = now()
        if self._refused is not None and started < self._again_at:
            raise self._refused
        if self._threads.available_tokens < 1:
            raise CacheConnectionError(f"{self._most} threads are connecting to {self.place} already", BACKEND)
        attempt = _Attempt(self._dial, self.place)
        try:
            made = await to_thread.run_sync(attempt.connect, abandon_on_cancel=True, limiter=self._threads)
        except CacheError as error:
            if self._cautious:
                self._refused, self._again_at = error, 2 * now() - started
            raise
        except BaseException:
            attempt.abandon()
            raise
        self._refused = None
        return made

    async def _resync(self, connection: Connection) -> None:
        try:
            # Not to be abandoned: the thread reads from the connection, for no longer than an answer may take.
            await to_thread.run_sync(connection.resync, limiter=self._threads)
        except BaseException:
            connection.close()
            raise


def common(lanes: Sequence[Lane], what: Callable[[Connection], int]) -> int | None:
    """The smallest of what the connected servers say; `None` if none is connected."""
    return min((what(lane.connection) for lane in lanes if lane.connection is not None), default=None)
