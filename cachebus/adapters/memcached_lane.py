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

BETWEEN_ATTEMPTS = 0.05
"""Seconds before a server that refused is asked again, where nobody waits for it."""


class _Attempt:
    """One attempt to connect, in a thread, and who closes the connection when nobody waits for it any more."""

    def __init__(self, dial: Dial, place: Place) -> None:
        self.made: Connection | None = None
        self.error: CacheError | None = None
        self.ended = False
        self.ended_at = 0.0
        self._dial = dial
        self._place = place
        self._guard = threading.Lock()
        self._abandoned = False

    def connect(self) -> Connection:
        """Called by a worker thread. Raises `CacheError`."""
        try:
            made = self._dial.connect(self._place)
            with self._guard:
                self.made = made
                if self._abandoned:
                    made.close()
            return made
        finally:
            self.ended = True

    def try_to_connect(self) -> None:
        """Called by a thread of its own: the outcome is `made` or `error`."""
        try:
            self.connect()
        except CacheError as error:
            self.ended_at = self._dial.clock.monotonic()
            self.error = error

    def abandon(self) -> None:
        """Called by the event loop."""
        with self._guard:
            self._abandoned = True
            if self.made is not None:
                self.made.close()


class Lane:
    """A server, the connection to it, and at most `most` threads that connect to it: one for whoever waits, the others
    those of batches that were given up while a name was looked up, which nothing can hurry.

    With `aside`, a server that is lost is connected to aside, by a thread for which nobody waits: what is asked meanwhile
    fails at once, so that one of several servers that answers nothing does not hold up the others' keys.
    """

    def __init__(self, place: Place, dial: Dial, most: int, *, aside: bool) -> None:
        self.place = place
        self.connection: Connection | None = None
        self._dial = dial
        self._most = most
        self._aside = aside
        self._turn = anyio.Lock(fast_acquire=True)
        self._threads = anyio.CapacityLimiter(most)
        self._closed = False
        self._ill = False
        self._attempt: _Attempt | None = None
        self._attempts: list[_Attempt] = []

    def __repr__(self) -> str:
        return f"<Lane to {self.place}, {len(self._attempts)}/{self._most} attempts to connect>"

    async def run(self, talk: Callable[[Connection], Talk[T]]) -> T:
        """What a talk over the connection comes to. Talks are held in the order in which they come.

        Raises `CacheConnectionError` when there is no connection. Cancelled, it breaks the talk off and the connection.
        """
        async with self._turn:
            if self._closed:
                raise CacheClosed("the connection to memcached was closed")
            if (connection := self.connection) is not None:
                connection.look()
            if connection is None or connection.lost:
                connection = self.connection = self._found() if self._ill else await self._connect()
            elif connection.out_of_sync:
                await self._resync(connection)
            result = await connection.converse(talk(connection))
            # A connection that was broken off says nothing about the server, one that was lost does.
            self._ill = self._aside and connection.lost
            return result

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
            if self._attempt is not None:
                self._attempt.abandon()
                self._attempt = None
            if self.connection is not None:
                self.connection.close()
                self.connection = None

    async def _connect(self) -> Connection:
        # Counted here, because anyio's limiter on asyncio forgets a thread that was given up.
        self._attempts = [each for each in self._attempts if not each.ended]
        if len(self._attempts) >= self._most:
            raise CacheConnectionError(f"{self._most} threads are connecting to {self.place} already", BACKEND)
        attempt = _Attempt(self._dial, self.place)
        self._attempts.append(attempt)
        try:
            return await to_thread.run_sync(attempt.connect, abandon_on_cancel=True, limiter=self._threads)
        except CacheError:
            self._ill = self._aside
            raise
        except BaseException:
            attempt.abandon()
            raise

    def _found(self) -> Connection:
        """The connection that was made aside. Raises `CacheConnectionError` while there is none."""
        attempt = self._attempt
        if attempt is not None and attempt.made is not None:
            self._attempt, self._ill = None, False
            return attempt.made
        if attempt is None or (
            attempt.error is not None and self._dial.clock.monotonic() > attempt.ended_at + BETWEEN_ATTEMPTS
        ):
            self._attempt = _Attempt(self._dial, self.place)
            threading.Thread(target=self._attempt.try_to_connect, name="cachebus-memcached", daemon=True).start()
        if attempt is not None and attempt.error is not None:
            raise attempt.error
        raise CacheConnectionError(f"{self.place} is lost and being connected to", BACKEND)

    async def _resync(self, connection: Connection) -> None:
        connection.pause()
        try:
            # Not to be abandoned: the thread reads from the connection, for no longer than an answer may take.
            await to_thread.run_sync(connection.resync, limiter=self._threads)
        except BaseException:
            connection.close()
            raise


def common(lanes: Sequence[Lane], what: Callable[[Connection], int]) -> int | None:
    """The smallest of what the connected servers say; `None` if none is connected."""
    return min((what(lane.connection) for lane in lanes if lane.connection is not None), default=None)
