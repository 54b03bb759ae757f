"""One server of a Redis Cluster, and the commands on their way to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from cachebus.messages import CacheClosed, CacheError

from .redis_commands import Command
from .redis_connect import Endpoint, RedisPool
from .redis_connection import Asked, RedisConnection, pack

_ASKING = pack("ASKING")


class UnderWay:
    """A batch under way: how many of its commands have no answer yet, and on which connections."""

    def __init__(self, commands: int, done: Callable[[], object]) -> None:
        self._done = done
        self._left = commands
        self._carriers: dict[RedisConnection, int] = {}

    @property
    def last_progress(self) -> float:
        """When bytes last moved on the connection, of those that still owe an answer, on which it is longest ago."""
        return min((each.last_progress for each in self._carriers), default=float("-inf"))

    def sent_on(self, connection: RedisConnection) -> None:
        """A command was sent."""
        self._carriers[connection] = self._carriers.get(connection, 0) + 1

    def answered_on(self, connection: RedisConnection) -> None:
        """A command that was sent has its reply, or will have none."""
        left = self._carriers[connection] - 1
        if left:
            self._carriers[connection] = left
        else:
            del self._carriers[connection]

    def one_more(self) -> UnderWay:
        """There is one command more."""
        self._left += 1
        return self

    def one_done(self) -> None:
        """A command has its answer; the last one answers the batch."""
        self._left -= 1
        if not self._left:
            self._done()


class Trip(Struct, eq=False):
    """A command on its way through the cluster. `asking` is set where a server takes it though the slot is another's yet,
    `whole` where it does not know the script by its name. It `follows` another whose answer needs it, which is
    `followed_by` so many."""

    command: Command
    slot: int
    packed: bytes
    batch: UnderWay
    follows: Trip | None = None
    hops: int = 0
    asking: bool = False
    whole: bool = False
    followed_by: int = 0

    @property
    def first(self) -> Trip:
        """The trip that it follows, or the one which that follows."""
        return self if self.follows is None else self.follows.first


Arrived = Callable[["ClusterNode", Trip, Any, float], None]
"""Takes the reply to a command, by which server, and that server's Unix time in seconds."""

Undelivered = Callable[[Sequence[Trip], CacheError, bool], None]
"""Takes commands that got no reply and why; the last argument says whether they were sent."""


class ClusterNode:
    """A server's connections and the queue before them: what is handed over first is sent first.

    Every command handed over is given to `arrived` or to `failed`, once. `trouble` is why the server could not be
    reached the last time, `None` if it could.
    """

    def __init__(self, place: Endpoint, pool: RedisPool, arrived: Arrived, failed: Undelivered) -> None:
        self.place = place
        self.pool = pool
        self.trouble: CacheError | None = None
        self._arrived = arrived
        self._failed = failed
        self._queue: deque[Sequence[Trip]] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._trial: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<ClusterNode {self.place}, {len(self._queue)} waiting, {self.pool!r}>"

    @property
    def has_room(self) -> bool:
        """Whether commands may be sent now."""
        connection = self.pool.up()
        return not self._queue and connection is not None and connection.has_room

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way to the server or back."""
        return not self._queue and self._pump is None and not any(each.in_flight for each in self.pool.connections)

    @property
    def is_down(self) -> bool:
        """Whether there is no connection, and the last attempt to make one has failed."""
        return self.trouble is not None and self.pool.up() is None

    def try_again(self) -> None:
        """Make a connection beside everything else. A server that is silent costs those who wait for it a connect
        timeout, and with them the rest of their batch; so only the first ones wait."""
        if self._trial is None:
            self._trial = asyncio.create_task(self._try())
            self._trial.add_done_callback(self._tried)

    async def room(self) -> None:
        """Wait until commands may be sent. Raises `CacheConnectionError` when the server cannot be reached."""
        while not self.has_room:
            if self._pump is not None:
                await asyncio.wait([self._pump])
                continue
            await self._ready()

    def send(self, trips: Sequence[Trip]) -> None:
        """Send commands after those that wait already. Never waits itself."""
        if self.has_room:
            connection = self.pool.up()
            assert connection is not None
            self._write(connection, trips)
            return
        self._queue.append(trips)
        if self._pump is None:
            self._pump = asyncio.create_task(self._send_waiting())
            self._pump.add_done_callback(self._pumped)

    async def close(self) -> None:
        """Finish what is under way, then close; cancelled, break it off."""
        if self._trial is not None:
            self._trial.cancel()
        try:
            while self._pump is not None:
                await asyncio.wait([self._pump])
            await self.pool.close()
        finally:
            self.drop(CacheClosed("the connection to redis was closed"))

    def drop(self, error: CacheError) -> None:
        """Give up what is under way."""
        for task in (self._pump, self._trial):
            if task is not None:
                task.cancel()
        self.pool.drop(error)
        while self._queue:
            self._failed(self._queue.popleft(), error, False)

    async def _ready(self) -> RedisConnection:
        try:
            connection = await self.pool.ready()
        except CacheError as error:
            self.trouble = error
            raise
        self.trouble = None
        return connection

    async def _send_waiting(self) -> None:
        while self._queue:
            try:
                connection = await self._ready()
            except CacheError as error:
                # All of them: each would wait as long for the same answer.
                waiting = [trip for trips in self._queue for trip in trips]
                self._queue.clear()
                self._failed(waiting, error, False)
                return
            self._write(connection, self._queue.popleft())

    async def _try(self) -> None:
        with contextlib.suppress(CacheError):  # It is the server's trouble, and remembered.
            await self._ready()

    def _tried(self, trial: asyncio.Task[None]) -> None:
        self._trial = None

    def _pumped(self, pump: asyncio.Task[None]) -> None:
        self._pump = None
        if self._queue and not pump.cancelled():
            # Handed over between the last look at the queue and now.
            self._pump = asyncio.create_task(self._send_waiting())
            self._pump.add_done_callback(self._pumped)

    def _write(self, connection: RedisConnection, trips: Sequence[Trip]) -> None:
        wanted = len(trips) + sum(trip.asking for trip in trips)
        data = b"".join([_ASKING + trip.packed if trip.asking else trip.packed for trip in trips])

        def answered(replies: Sequence[Any] | CacheError) -> None:
            for trip in trips:
                trip.batch.answered_on(connection)
            if isinstance(replies, CacheError):
                self._failed(trips, replies, True)
                return
            now = connection.now()
            at = 0
            for trip in trips:
                at += trip.asking
                self._arrived(self, trip, replies[at], now)
                at += 1

        for trip in trips:
            trip.batch.sent_on(connection)
        connection.send(data, Asked(wanted, answered))
