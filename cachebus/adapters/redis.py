"""The Redis store: batches of requests over auto-pipelined connections, in a namespace of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast

from cachebus.actors.ports import NO_PROGRESS, SYSTEM_CLOCK, Clock, Gauges, OnReplies, Progress
from cachebus.messages import (
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    Clear,
    Cleared,
    Deleted,
    DeletePattern,
    Failed,
    Get,
    Reply,
    Request,
)

from .redis_connect import Connector, Credentials, Endpoint, TlsFiles, find_master
from .redis_connection import RedisConnection, pack_words
from .redis_errors import BACKEND
from .redis_listener import RedisListener
from .redis_plan import CAPABILITIES, Plan
from .redis_pool import RedisPool
from .redis_sent import SentCommands, SentGets, SentScript, script_call
from .redis_tag_scripts import READ
from .redis_tags import TagSpace
from .redis_values import milliseconds
from .redis_walk import Walks, remove_matching, submitted
from .redis_watch import LeaseWatch

__all__ = ["Credentials", "Endpoint", "RedisStore", "TlsFiles"]


class RedisStore:
    """A `PipelinedStore` in a Redis server, version 6.2 or newer, on asyncio.

    Keys stand under `<namespace>:`, and nothing outside of that is read or touched. Values are bytes and what msgpack
    gives back as it was; the version of a value is the server's clock in microseconds. With `service`, `places` are
    those of sentinels, which know its master. `default_ttl`, `connect_timeout` and `health_check_interval` are seconds;
    `window` batches are in flight at most on each of `max_connections` connections.

    `Clear` and `DeletePattern` walk over the keys beside the other requests: what is stored meanwhile may go or stay.
    """

    name = BACKEND
    capabilities = CAPABILITIES
    max_batch = 128
    long_running: frozenset[type[Request[Any]]] = frozenset({Clear, DeletePattern})

    def __init__(
        self,
        places: Sequence[Endpoint],
        *,
        namespace: str,
        identity: Credentials | None = None,
        database: int = 0,
        tls: TlsFiles | None = None,
        service: str | None = None,
        sentinel_identity: Credentials | None = None,
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
        self._is_plain = planner is Plan
        self._default_px = milliseconds(default_ttl)
        self._dial = Connector(
            clock=clock,
            identity=identity or Credentials(),
            database=database,
            timeout=connect_timeout,
            health_interval=health_check_interval,
            window=window,
        )
        self._sentinel_identity = sentinel_identity or Credentials()
        self._max_connections = max_connections
        self._pool: RedisPool | None = None
        self._walks = Walks(self.long_running, self._walk, self.execute)
        self._watch = LeaseWatch(self.listener, namespace)
        self.watch = self._watch.watch

    def __repr__(self) -> str:
        return f"<RedisStore {self._prefix!r} at {', '.join(map(str, self._places))}>"

    async def open(self) -> None:
        self._dial = await self._dial.prepared(self._tls)
        self._pool = RedisPool(self._connect, self._max_connections)
        await self._pool.connect()

    async def close(self) -> None:
        """Finish what is under way, then close; cancelled, break it off."""
        try:
            await self._watch.close()
            await self._walks.finish()
            if self._pool is not None:
                await self._pool.close()
        finally:
            self._walks.cancel()
            if self._pool is not None:
                self._pool.drop()

    def listener(self) -> RedisListener:
        """A listener to the server's channels, with a connection of its own. Whoever asks for it closes it."""
        return RedisListener(self._connect, clock=self._dial.clock)

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return await submitted(self.submit, batch)

    async def submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        pool = self._opened()
        if not self.long_running.isdisjoint(map(type, batch)):
            self._walks.start(batch, on_replies)
            return NO_PROGRESS
        connection = pool.main
        if connection is None or not connection.has_room:
            connection = await pool.ready()
        # Nothing waits from here on, so that the room is still there, and what is sent first is sent first.
        return self._send(connection, batch, on_replies)

    def try_submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress | None:
        connection = None if self._pool is None else self._pool.main
        if (
            connection is None
            or connection.lost is not None
            or connection.paused
            or len(connection.in_flight) >= connection.window
            or type(batch[0]) in self.long_running
        ):
            return None
        return self._send(connection, batch, on_replies)

    def _send(self, connection: RedisConnection, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        if self._is_plain and batch:
            with suppress(UnicodeEncodeError):  # A careful plan finds out which key it is.
                if type(batch[0]) is Get:
                    if self._send_gets(connection, batch, on_replies):
                        return connection
                elif self._send_script(connection, batch, on_replies):
                    return connection
        plan = self._plan(batch)
        try:
            data = plan.packed()
        except UnicodeEncodeError:
            plan = self._plan(batch, careful=True)
            data = plan.packed()
        if not plan.commands:
            on_replies(plan.done())
        else:
            connection.send(data, SentCommands(plan.commands, connection, plan.done, on_replies))
        return connection

    def _send_gets(self, connection: RedisConnection, batch: Sequence[Request[Any]], on_replies: OnReplies) -> bool:
        prefix, space = self._prefix, self._space
        names = [prefix + request.key for request in batch if type(request) is Get]
        if len(names) < len(batch):
            return False
        wanted, places = dict.fromkeys(names), None
        if len(wanted) < len(names):  # Equal keys share a place.
            at = {name: place for place, name in enumerate(wanted)}
            places = [at[name] for name in names]
        checked = space.seen
        data = pack_words(("EVALSHA", READ.sha, len(wanted), *wanted) if checked else ("MGET", *wanted))
        connection.send(data, SentGets(connection, tuple(wanted), places, len(prefix), space, checked, on_replies))
        return True

    def _send_script(self, connection: RedisConnection, batch: Sequence[Request[Any]], on_replies: OnReplies) -> bool:
        try:
            call = script_call(batch, self._prefix, self._default_px, self._space)
        except CacheError as error:
            if len(batch) > 1:
                return False  # The plan finds out which request it is.
            on_replies([Failed.of(error)])
            return True
        if call is None:
            return False
        words, script, make = call
        keys = words[1 : 1 + cast("int", words[0])]
        data = pack_words(("EVALSHA", script.sha, *words))
        connection.send(data, SentScript(connection, keys, make, partial(self._plan, batch), on_replies))
        return True

    def _plan(self, batch: Sequence[Request[Any]], *, careful: bool = False) -> Plan:
        return self._planner(batch, self._prefix, self._default_ttl, self._space, careful=careful)

    async def _walk(self, request: Request[Any]) -> Reply:
        connection = await self._opened().side()
        if isinstance(request, DeletePattern):
            return Deleted(await remove_matching(connection, self._prefix, request.pattern))
        await remove_matching(connection, self._prefix, "*")
        return Cleared()

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
