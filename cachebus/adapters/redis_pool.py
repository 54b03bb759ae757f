"""The connections to one Redis server: one that carries the requests, and a few beside it for long walks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cachebus.messages import CacheClosed, CacheConnectionError, CacheError

from .redis_connection import RedisConnection
from .redis_errors import BACKEND

Connect = Callable[[], Awaitable[RedisConnection]]


class RedisPool:
    """Up to `most` connections, made when they are needed and made anew after they were lost.

    One of them carries every request, because one that is always busy is the fastest, and because it keeps their order.
    That is `main`, which may have been lost. The others are for walks over many keys; with `most=1` these take turns with
    the requests.
    """

    def __init__(self, connect: Connect, most: int) -> None:
        self._make_one = connect
        self._most = most
        self.main: RedisConnection | None = None
        self._sides: list[RedisConnection] = []
        self._next = 0
        # One connection is made at a time, so that their number is known.
        self._connecting = asyncio.Lock()
        self._closed = False
        self._failures = 0
        self._failure: CacheError | None = None

    def __repr__(self) -> str:
        return f"<RedisPool of {len(self.connections)}/{self._most} connections>"

    @property
    def connections(self) -> list[RedisConnection]:
        """Those that are up."""
        return [each for each in (self.main, *self._sides) if each is not None and each.lost is None]

    def up(self) -> RedisConnection | None:
        """The connection for requests, if there is one now."""
        main = self.main
        return main if main is not None and main.lost is None else None

    async def connect(self) -> RedisConnection:
        """The connection for requests. Raises `CacheConnectionError` when the server cannot be reached."""
        failures = self._failures
        async with self._connecting:
            connection = self.up()
            if connection is None:
                if failures != self._failures and self._failure is not None:
                    # An attempt has failed while we waited: ours would take as long and come to the same.
                    raise self._failure
                connection = self.main = await self._make()
            return connection

    async def ready(self) -> RedisConnection:
        """The connection for requests, once there is room for a batch. Raises as `connect` does."""
        while True:
            connection = self.up() or await self.connect()
            try:
                await connection.room()
            except CacheError:
                continue  # Lost while we waited, and nothing was sent: a new one, or the reason why there is none.
            return connection

    async def side(self) -> RedisConnection:
        """A connection for a walk, each in turn. Raises `CacheConnectionError` when the server cannot be reached."""
        if self._most == 1:
            return await self.connect()
        async with self._connecting:
            self._sides = [each for each in self._sides if each.lost is None]
            idle = [each for each in self._sides if not each.in_flight]
            if not idle and len(self._sides) < self._most - 1:
                made = await self._make()
                self._sides.append(made)
                return made
            self._next += 1
            among = idle or self._sides
            return among[self._next % len(among)]

    async def close(self) -> None:
        """Finish what is in flight, then close. Cancelled, it closes at once."""
        self._closed = True
        try:
            for connection in self.connections:
                await connection.drain()
        finally:
            self.drop(CacheClosed("the connection to redis was closed"))

    def drop(self, error: CacheError | None = None) -> None:
        """Give up every connection; the next request makes a new one."""
        error = error or CacheConnectionError("the connection to redis was given up", BACKEND)
        for connection in self.connections:
            connection.drop(error)

    async def _make(self) -> RedisConnection:
        if self._closed:
            raise CacheClosed("the connection to redis was closed")
        try:
            connection = await self._make_one()
        except CacheError as error:
            self._failures += 1
            self._failure = error
            raise
        if self._closed:
            connection.drop(CacheClosed("the connection to redis was closed"))
        return connection
