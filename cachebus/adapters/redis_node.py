"""One server of a Redis Cluster, and the commands on their way to it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

from cachebus.messages import CacheError

from .redis_commands import Command, slot_of
from .redis_connect import Endpoint, RedisPool
from .redis_connection import Asked, RedisConnection, pack
from .redis_errors import closed

_ASKING = pack("ASKING")


class UnderWay:
    """A batch under way: its commands, and what to call when each has its answer."""

    def __init__(self, commands: Sequence[Command], done: Callable[[], object]) -> None:
        self.trips: list[Trip] = []
        self._left = 0
        self._done = done
        for command in commands:
            self.add(command)

    @property
    def last_progress(self) -> float:
        """When bytes last moved on the connection, of those that still owe an answer, on which it is longest ago."""
        carriers = {each.connection for each in self.trips if each.connection is not None}
        return min((each.last_progress for each in carriers), default=float("-inf"))

    def add(self, command: Command, *, follows: Trip | None = None, hops: int = 0) -> Trip:
        """Take in one command more."""
        trip = Trip(command, slot_of(command.key), command.packed(), self, follows, hops)
        self.trips.append(trip)
        self._left += 1
        return trip

    def one_done(self) -> None:
        """A command has its answer; the last one answers the batch."""
        self._left -= 1
        if not self._left:
            self.trips = []  # They refer to the batch.
            self._done()


class Trip(Struct, eq=False):
    """A command on its way through the cluster, on a `connection` while it has no answer.

    `asking` is set if a server takes it though the slot is another's yet, `whole` if the server does not know the script by
    its name. It `follows` another whose answer needs it, which is `followed_by` so many.
    """

    command: Command
    slot: int
    packed: bytes
    batch: UnderWay
    follows: Trip | None = None
    hops: int = 0
    asking: bool = False
    whole: bool = False
    followed_by: int = 0
    connection: RedisConnection | None = None

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

    Every command handed over is given to `arrived` or to `failed`, once.
    """

    def __init__(self, place: Endpoint, pool: RedisPool, arrived: Arrived, failed: Undelivered) -> None:
        self.place = place
        self.pool = pool
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
    def trouble(self) -> CacheError | None:
        """Why there is no connection, if the last attempt to make one has failed."""
        return self.pool.trouble if self.pool.up() is None else None

    def try_again(self) -> None:
        """Make a connection beside everything else. Waiting for a silent server costs a batch the time to connect, so only
        the first batches wait."""
        if self._trial is None or self._trial.done():
            self._trial = asyncio.create_task(self._try())

    async def room(self) -> None:
        """Wait until commands may be sent. Raises `CacheConnectionError` when the server cannot be reached."""
        while not self.has_room:
            if self._pump is not None:
                await asyncio.wait([self._pump])
                continue
            await self.pool.ready()

    def send(self, trips: Sequence[Trip]) -> None:
        """Send commands after those that wait already. Never waits itself."""
        connection = self.pool.up()
        if connection is not None and self.has_room:
            self._write(connection, trips)
            return
        self._queue.append(trips)
        if self._pump is None:
            self._pump = asyncio.create_task(self._send_waiting())

    async def close(self) -> None:
        """Finish what is under way, then close; cancelled, break it off."""
        if self._trial is not None:
            self._trial.cancel()
        try:
            while self._pump is not None:
                await asyncio.wait([self._pump])
            await self.pool.close()
        finally:
            self.drop()

    def drop(self) -> None:
        """Give up what is under way."""
        for task in (self._pump, self._trial):
            if task is not None:
                task.cancel()
        self._pump = None
        self.pool.drop()
        while self._queue:
            self._failed(self._queue.popleft(), closed(), False)

    async def _send_waiting(self) -> None:
        try:
            while self._queue:
                connection = await self.pool.ready()
                self._write(connection, self._queue.popleft())
        except CacheError as error:
            # All of them: each would wait as long for the same answer.
            waiting = [trip for trips in self._queue for trip in trips]
            self._queue.clear()
            self._pump = None  # What the failures lead to may need another.
            self._failed(waiting, error, False)
        finally:
            if self._pump is asyncio.current_task():
                self._pump = None

    async def _try(self) -> None:
        with contextlib.suppress(CacheError):  # It is the server's trouble, and the pool remembers it.
            await self.pool.ready()

    def _write(self, connection: RedisConnection, trips: Sequence[Trip]) -> None:
        wanted = len(trips) + sum(trip.asking for trip in trips)
        data = b"".join([_ASKING + trip.packed if trip.asking else trip.packed for trip in trips])

        def answered(replies: Sequence[Any] | CacheError) -> None:
            for trip in trips:
                trip.connection = None
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
            trip.connection = connection
        connection.send(data, Asked(wanted, answered))
