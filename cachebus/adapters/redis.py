"""The Redis store: batches of requests over auto-pipelined connections, in a namespace of its own."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import hiredis

from cachebus.actors.ports import SYSTEM_CLOCK, Capabilities, Clock, Gauges, Replied
from cachebus.messages import (
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    Clear,
    Cleared,
    Deleted,
    DeletePattern,
    Failed,
    Reply,
    Request,
    WatchLease,
)

from .redis_commands import Command, changes, sendable_again
from .redis_connection import RedisConnection
from .redis_dial import Dial, Identity, Place, TlsFiles, find_master
from .redis_errors import BACKEND, STALE_ROLE, code_of
from .redis_listener import RedisListener
from .redis_plan import Plan
from .redis_pool import RedisPool
from .redis_tags import TagSpace
from .redis_values import VALUE_MAX
from .redis_walk import remove_matching
from .redis_watch import LeaseWatch

__all__ = ["Identity", "Place", "RedisStore", "TlsFiles"]


class RedisStore:
    """A `PipelinedStore` in a Redis server, version 6.2 or newer, on asyncio.

    Keys stand under `<namespace>:`, and nothing outside of that is read or touched. Values are bytes and what msgpack
    gives back as it was; the version of a value is the server's clock in microseconds. With `service`, `places` are
    those of sentinels, which know its master. `default_ttl`, `connect_timeout` and `health_check_interval` are seconds;
    `window` batches are in flight at most on each of `max_connections` connections.

    `Clear` and `DeletePattern` walk over the keys beside the other requests: what is stored meanwhile may go or stay.
    """

    name = BACKEND
    capabilities = Capabilities(
        patterns=True,
        tags=True,
        compare_and_set=True,
        counters=True,
        leases=True,
        rate_limits=True,
        locks=True,
        max_value_bytes=VALUE_MAX,
    )
    max_batch = 128
    apart: frozenset[type[Request[Any]]] = frozenset({Clear, DeletePattern})

    def __init__(
        self,
        places: Sequence[Place],
        *,
        namespace: str,
        identity: Identity | None = None,
        database: int = 0,
        tls: TlsFiles | None = None,
        service: str | None = None,
        sentinel_identity: Identity | None = None,
        default_ttl: float | None = None,
        window: int = 8,
        max_connections: int = 2,
        connect_timeout: float = 1.0,
        health_check_interval: float | None = 2.0,
        clock: Clock = SYSTEM_CLOCK,
        planner: Callable[..., Plan] = Plan,
    ) -> None:
        if not namespace or ":" in namespace:
            # Else the keys of "a:b" would be keys of "a" too.
            raise CacheConfigurationError(f"redis: a namespace is not empty and has no colon, unlike {namespace!r}")
        self._places = tuple(places)
        self._service = service
        self._tls = tls
        self._prefix = f"{namespace}:"
        self._default_ttl = default_ttl
        self._space = TagSpace(namespace, here=True)
        self._planner = planner
        self._dial = Dial(
            clock=clock,
            identity=identity or Identity(),
            database=database,
            timeout=connect_timeout,
            silence=health_check_interval,
            window=window,
        )
        self._sentinel_identity = sentinel_identity or Identity()
        self._max_connections = max_connections
        self._pool: RedisPool | None = None
        self._walks: set[asyncio.Task[None]] = set()
        self._watch = LeaseWatch(self.listener, namespace)

    def __repr__(self) -> str:
        return f"<RedisStore {self._prefix!r} at {', '.join(map(str, self._places))}>"

    async def open(self) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise CacheConfigurationError("redis needs an asyncio event loop, and this is another's") from None
        if self._tls is not None:
            context = await asyncio.to_thread(self._tls.context, self.name)
            self._dial = dataclasses.replace(self._dial, tls=context)
        self._pool = RedisPool(self._connect, self._max_connections)
        await self._pool.main()

    async def close(self) -> None:
        """Finish what is under way, then close; cancelled, break it off."""
        try:
            await self._watch.close()
            while self._walks:
                await asyncio.wait(self._walks)
            if self._pool is not None:
                await self._pool.close()
        finally:
            for walk in self._walks:
                walk.cancel()
            if self._pool is not None:
                self._pool.drop()

    def listener(self) -> RedisListener:
        """A listener to the server's channels, with a connection of its own. Whoever asks for it closes it."""
        return RedisListener(self._connect, clock=self._dial.clock)

    def watch(self, request: WatchLease, told: Callable[[Reply], None]) -> None:
        self._watch.watch(request, told)

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        future: asyncio.Future[Sequence[Reply]] = asyncio.get_running_loop().create_future()

        def replied(replies: Sequence[Reply]) -> None:
            if not future.done():
                future.set_result(replies)

        await self.submit(batch, replied)
        return await future

    async def submit(self, batch: Sequence[Request[Any]], replied: Replied) -> None:
        pool = self._opened()
        walks = [at for at, request in enumerate(batch) if type(request) in self.apart]
        if walks:
            task = asyncio.create_task(self._submit_with_walks(pool, batch, walks, replied))
            self._walks.add(task)
            task.add_done_callback(self._walks.discard)
            return
        connection = pool.up()
        if connection is None or not connection.has_room:
            connection = await self._ready(pool)
        # Nothing waits from here on, so that the room is still there, and what is sent first is sent first.
        self._send(connection, batch, replied)

    def submit_at_once(self, batch: Sequence[Request[Any]], replied: Replied) -> bool:
        connection = None if self._pool is None else self._pool.up()
        if connection is None or connection.in_flight or not connection.has_room:
            return False
        if not self.apart.isdisjoint(map(type, batch)):
            return False
        self._send(connection, batch, replied)
        return True

    def _send(self, connection: RedisConnection, batch: Sequence[Request[Any]], replied: Replied) -> None:
        plan = self._planner(batch, self._prefix, self._default_ttl, self._space)
        try:
            data = plan.packed()
        except UnicodeEncodeError:
            plan = self._planner(batch, self._prefix, self._default_ttl, self._space, careful=True)
            data = plan.packed()
        commands = plan.commands
        if not commands:
            replied(plan.done())
            return

        def answered(replies: list[Any] | CacheError) -> None:
            if self._settle(connection, commands, replies, lambda: replied(plan.done())):
                replied(plan.done())

        connection.send(data, len(commands), answered, lambda: changes(commands))

    def _settle(
        self,
        connection: RedisConnection,
        commands: Sequence[Command],
        replies: list[Any] | CacheError,
        then: Callable[[], None],
    ) -> bool:
        """Take in the replies. `False` if commands had to be sent on or once more, and `then` is called later."""
        if isinstance(replies, CacheError):
            for command in commands:
                command.give_up(replies)
            return True
        now = connection.now()
        unknown: list[Command] = []
        more: list[Command] = []
        stale = False
        for command, reply in zip(commands, replies, strict=True):
            if type(reply) is hiredis.ReplyError:
                code = code_of(reply)
                if code == "NOSCRIPT" and command.script is not None:
                    unknown.append(command)
                    continue
                stale = stale or code in STALE_ROLE
            more += command.take(reply, now)
        if stale:
            connection.drop(CacheConnectionError(f"{connection.server} has become a replica", BACKEND))
        if not unknown and not more:
            return True

        # Somebody has emptied the script cache, so the unknown did nothing: sent whole they run, and the server knows them
        # again. What follows from an answer only reads.
        again = sendable_again(commands, unknown, connection.changes_in_flight)
        if not again and not more:
            return True

        def answered(replies: list[Any] | CacheError) -> None:
            if self._settle(connection, [*again, *more], replies, then):
                then()

        data = [*(each.packed(whole=True) for each in again), *(each.packed() for each in more)]
        connection.send(b"".join(data), len(data), answered, lambda: changes(again))
        return False

    async def _ready(self, pool: RedisPool) -> RedisConnection:
        """The connection for requests, with room for a batch."""
        while True:
            connection = pool.up() or await pool.main()
            try:
                await connection.room()
            except CacheError:
                continue  # Lost while we waited, and nothing was sent: a new one, or the reason why there is none.
            return connection

    async def _submit_with_walks(
        self, pool: RedisPool, batch: Sequence[Request[Any]], walks: Sequence[int], replied: Replied
    ) -> None:
        replies: list[Any] = [None] * len(batch)
        beside = [at for at in range(len(batch)) if at not in walks]
        try:
            for at in walks:
                replies[at] = await self._walk(pool, batch[at])
            if beside:
                for at, reply in zip(beside, await self.execute([batch[at] for at in beside]), strict=True):
                    replies[at] = reply
        except CacheError as error:
            replies = [Failed.of(error) if reply is None else reply for reply in replies]
        except asyncio.CancelledError:
            replied([Failed.of(CacheConnectionError("the store was closed", BACKEND))] * len(batch))
            raise
        replied(replies)

    async def _walk(self, pool: RedisPool, request: Request[Any]) -> Reply:
        try:
            connection = await pool.side()
            if isinstance(request, DeletePattern):
                return Deleted(await remove_matching(connection, self._prefix, request.pattern))
            await remove_matching(connection, self._prefix, "*")
            return Cleared()
        except CacheError as error:
            return Failed.of(error)

    async def _connect(self) -> RedisConnection:
        if self._service is None:
            return await self._dial.connect(self._places[0])
        to_sentinels = dataclasses.replace(self._dial, identity=self._sentinel_identity, database=0)
        place = await find_master(to_sentinels, self._places, self._service)
        return await self._dial.connect(place, "master")

    def _opened(self) -> RedisPool:
        if self._pool is None:
            raise CacheConnectionError("the store is not open", BACKEND)
        return self._pool
