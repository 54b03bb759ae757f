"""Store for a Redis server: sends batches of requests over auto-pipelined connections."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, TypeAlias

import hiredis
from msgspec import Struct

from cachebus.actors.ports import NO_PROGRESS, Gauges, OnReplies, Progress
from cachebus.messages import (
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    Clear,
    Cleared,
    Deleted,
    DeletePattern,
    Get,
    GetOrLease,
    ReleaseLease,
    RenewLease,
    Reply,
    Request,
    Set,
    Stored,
)

from .commands import UNREADABLE, ScriptCall, SentCommands
from .connect import Connector, Credentials, Endpoint, RedisPool, TlsFiles, find_master
from .connection import Argument, RedisConnection, pack_words
from .entry import CAPABILITIES, NO_STAMP, HasTags, TagSpace, encode, milliseconds, read_run
from .errors import BACKEND
from .leases import commit_call, lease_call
from .planner import Plan
from .pubsub import ChannelSubscription, LeaseWatch
from .runs import COMMAND_BYTES
from .scan import ScanRunner, submitted
from .scripts import READ
from .write_script import PLAIN_BYTES, WRITE

__all__ = ["Connector", "Credentials", "Endpoint", "RedisStore", "TlsFiles"]


class RedisStore:
    """`PipelinedStore` for a Redis server, version 6.2 or newer. Needs asyncio.

    Entries are stored under `<namespace>:`, and bookkeeping keys under `<namespace>#`; the store touches no other key.
    Values are bytes, or any value that msgpack returns unchanged. The version of a value is the server's time in
    microseconds.

    If `service` is given, `endpoints` are the endpoints of its sentinels, which name the master. `default_ttl` is in
    seconds. `call` turns requests into scripts for stores other than a cache, such as the lock store.

    `Clear` and `DeletePattern` scan the keys while other requests are served. An entry written during the scan may or
    may not be deleted.
    """

    name = BACKEND
    capabilities = CAPABILITIES
    max_batch = 256
    long_running: frozenset[type[Request[Any]]] = frozenset({Clear, DeletePattern})

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        connector: Connector | None = None,
        *,
        namespace: str,
        service: str | None = None,
        sentinel_identity: Credentials | None = None,
        default_ttl: float | None = None,
        call: Callable[[Request[Any]], ScriptCall] | None = None,
    ) -> None:
        if not namespace or ":" in namespace:
            # Otherwise the keys of "a:b" would also be keys of "a".
            raise CacheConfigurationError(
                f"redis: the namespace must be non-empty and contain no colon, not {namespace!r}"
            )
        self._endpoints = tuple(endpoints)
        self._service = service
        self._sentinel_identity = sentinel_identity or Credentials()
        self._connector = connector or Connector()
        self._prefix = f"{namespace}:"
        self._default_ttl = default_ttl
        self._default_px = milliseconds(default_ttl)
        self._space = TagSpace(namespace, here=True)
        self._call = call
        self._pool: RedisPool | None = None
        self._scans = ScanRunner(self.long_running, self._run_scan, self.execute)
        self._watch = LeaseWatch(self.subscribe, namespace)
        self.watch = self._watch.watch

    def __repr__(self) -> str:
        return f"<RedisStore {self._prefix!r} at {', '.join(map(str, self._endpoints))}>"

    async def open(self) -> None:
        self._connector = await self._connector.prepared()
        self._pool = RedisPool(self._connect, self._connector.max_connections)
        await self._pool.connect()

    async def close(self) -> None:
        """Wait for pending requests, then close. If cancelled, abort them and close."""
        try:
            await self._watch.close()
            await self._scans.finish()
            if self._pool is not None:
                await self._pool.close()
        finally:
            self._scans.cancel()
            if self._pool is not None:
                self._pool.drop()

    def subscribe(self, *arguments: Any) -> ChannelSubscription:
        """Subscribe to a channel. Takes the arguments of `ChannelSubscription` except `connect`; close it after use."""
        return ChannelSubscription(self._connect, *arguments, clock=self._connector.clock)

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return await submitted(self.submit, batch)

    async def submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        pool = self._opened()
        if not self.long_running.isdisjoint(map(type, batch)):
            self._scans.start(batch, on_replies)
            return NO_PROGRESS
        connection = pool.main
        if connection is None or not connection.has_room:
            connection = await pool.ready()
        # No await from here on: the connection still has room, and batches keep their order.
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
        if self._call is None and batch:
            checked = self._space.seen
            try:
                direct = self._gets(batch, checked) if type(batch[0]) is Get else self._script_call(batch)
                data = b"" if direct is None else pack_words(direct[0])
            except (UnicodeEncodeError, CacheError):
                direct, data = None, b""  # The plan reports the error on the request that caused it.
            if direct is not None:
                _, keys, read = direct
                plan_it = partial(self._plan, batch, checked=checked)
                connection.send(data, SentDirectly(connection, keys, read, plan_it, on_replies))
                return connection
        plan = self._plan(batch)
        if not plan.commands:
            on_replies(plan.done())
        else:
            data = b"".join([command.packed() for command in plan.commands])
            connection.send(data, SentCommands(plan.commands, connection, plan.done, on_replies))
        return connection

    # The most common batches become one command, in a third of the time that a plan takes. Others return `None`.

    def _gets(self, batch: Sequence[Request[Any]], checked: bool) -> Direct | None:
        """Build one command for a run of `Get`s. If `checked`, the server omits entries with invalidated tags."""
        prefix = self._prefix
        names = [prefix + request.key for request in batch if type(request) is Get]
        if len(names) < len(batch):
            return None
        wanted = dict.fromkeys(names)
        read: Read = read_run
        if len(wanted) < len(names):  # Equal keys are sent once.
            at = {name: place for place, name in enumerate(wanted)}
            read = partial(_read_places, [at[name] for name in names])
        return ("EVALSHA", READ.sha, len(wanted), *wanted) if checked else ("MGET", *wanted), (), read

    def _script_call(self, batch: Sequence[Request[Any]]) -> Direct | None:
        """Build one command for a run of plain `Set`s of bytes or for one lease request. Raises `CacheError`."""
        request: Any = batch[0]
        kind: object = request.__class__
        prefix, default_px = self._prefix, self._default_px
        stores = kind is Set
        if kind is GetOrLease or kind is ReleaseLease or kind is RenewLease or (stores and request.lease is not None):
            if len(batch) > 1:
                return None
            name = prefix + request.key
            stamp = NO_STAMP
            if kind is GetOrLease or (stores and request.tags):
                stamp = self._space.new_stamp(request.tags)
            if stores:
                px = default_px if request.ttl == "default" else milliseconds(request.ttl)
                call, _, make, script = commit_call(request, name, encode(request.value), px, stamp, True)
            else:
                call, _, make, script = lease_call(request, name, stamp, None)
            return ("EVALSHA", script.sha, *call), (name,), lambda reply, now: [make(reply, now)]
        if not stores:
            return None
        names: list[Argument] = []
        bodies: list[bytes] = []
        lifetimes: list[str] = []
        for request in batch:
            if (
                type(request) is not Set
                or type(value := request.value) is not bytes
                or request.tags
                or request.only_if is not None
                or request.lease is not None
            ):
                return None
            ttl = request.ttl
            names.append(prefix + request.key)
            bodies.append(b"B" + value)
            lifetimes.append(default_px if ttl == "default" else milliseconds(ttl))
        sizes = list(map(len, bodies))
        if sum(sizes) >= COMMAND_BYTES:
            return None
        px = lifetimes[0]
        values: Iterable[Argument] = (*bodies, px)
        if max(sizes) > PLAIN_BYTES or lifetimes.count(px) < len(lifetimes):
            values = chain.from_iterable(zip(bodies, lifetimes, repeat("")))
        words = ("EVALSHA", WRITE.here.sha, len(names), *names, *values)
        return words, names, partial(_read_versions, len(names))

    def _plan(self, batch: Sequence[Request[Any]], *, checked: bool | None = None) -> Plan:
        return Plan(batch, self._prefix, self._default_ttl, self._space, checked=checked, call=self._call)

    async def _run_scan(self, request: Request[Any]) -> Reply:
        connection = await self._opened().side()
        if isinstance(request, DeletePattern):
            return Deleted(await self._scans.remove(connection, self._prefix, request.pattern))
        await self._scans.remove(connection, self._prefix, "*")
        return Cleared()

    async def _connect(self) -> RedisConnection:
        if self._service is None:
            return await self._connector.connect(self._endpoints[0])
        to_sentinels = dataclasses.replace(self._connector, identity=self._sentinel_identity, database=0)
        endpoint = await find_master(to_sentinels, self._endpoints, self._service)
        return await self._connector.connect(endpoint, "master")

    def _opened(self) -> RedisPool:
        if self._pool is None:
            raise CacheConnectionError("the store is not open", BACKEND)
        return self._pool


Read: TypeAlias = Callable[[Any, float], Sequence[Reply]]
"""Converts the reply of a command into the replies of its batch, given the server's Unix time in seconds."""


Direct: TypeAlias = tuple[tuple[Argument, ...], Sequence[Argument], Read]
"""The words of a command, the keys that it may change, and the function that reads its reply."""


class SentDirectly(Struct, eq=False):
    """Batch sent as one command, which may change `keys`. If `read` cannot convert the reply, `plan` handles it."""

    connection: RedisConnection
    keys: Sequence[Argument]
    read: Read
    plan: Callable[[], Plan]
    on_replies: OnReplies
    wanted: int = 1

    def changes(self) -> Iterable[Any]:
        return self.keys

    def answer(self, replies: Sequence[Any] | CacheError) -> None:
        connection = self.connection
        if not isinstance(replies, CacheError) and type(replies[0]) is not hiredis.ReplyError:
            try:
                made = self.read(replies[0], connection.received_at + connection.offset)
            except (HasTags, *UNREADABLE):
                pass  # The plan finds the requests that are affected.
            else:
                self.on_replies(made)
                return
        plan = self.plan()
        SentCommands(plan.commands, connection, plan.done, self.on_replies).answer(replies)


def _read_places(places: Sequence[int], values: Any, now: float) -> Sequence[Reply]:
    return read_run([values[place] for place in places], now)


def _read_versions(count: int, versions: Any, now: float) -> Sequence[Reply]:
    if type(versions) is int:
        return [Stored(float(versions))] * count
    if len(versions) != count:
        raise ValueError("not one version for each value")
    return [Stored(float(version)) for version in versions]
