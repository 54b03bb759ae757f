"""The Memcached store. It executes batches of requests in a namespace, on one or several servers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import blake2b
from typing import Any, cast

import anyio
import msgspec
from anyio import to_thread
from pymemcache.client.rendezvous import RendezvousHash

from cachebus.actors.ports import SYSTEM_CLOCK, Capabilities, Clock, Gauges, OnReplies, Progress
from cachebus.messages import (
    CacheConnectionError,
    CacheError,
    Clear,
    Deleted,
    DeleteMany,
    Failed,
    FoundMany,
    GetMany,
    InvalidateTags,
    Reply,
    Request,
    SetMany,
    StoredMany,
)

from ..common.tls import TlsFiles
from .connection import Connection, Exchange
from .entry import HEADER
from .errors import BACKEND
from .keys import Hasher, Keys, blake
from .planner import carry_out
from .server import Connector, Endpoint, Result, Server
from .values import CHUNKED_MAX, Values

__all__ = ["Endpoint", "MemcachedStore", "TlsFiles"]

Share = list[tuple[int, Request[Any]]]
"""A server's part of a batch: requests, each with the position in the batch of the request that it belongs to."""


class MemcachedStore:
    """A `PipelinedStore` on one or several Memcached servers, version 1.6.10 or newer. Works on asyncio and on trio.

    Each server has one batch in flight; a batch for several servers is sent to all of them at once. Keys are
    distributed by rendezvous hashing, so adding, removing or losing a server only affects its own keys. Every server
    has its own generation of the namespace and of each tag. Times to live are rounded up to whole seconds.
    """

    name = BACKEND
    capabilities = Capabilities(
        tags=True, compare_and_set=True, counters=True, leases=True, rate_limits=True, locks=True, ttl_resolution=1.0
    )
    max_batch = 512
    long_running: frozenset[type[Request[Any]]] = frozenset()

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        namespace: str,
        tls: TlsFiles | None = None,
        default_ttl: float | None = None,
        connect_timeout: float = 1.0,
        timeout: float = 1.0,
        max_connections: int = 2,
        chunked: bool = False,
        hasher: Hasher = blake,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._keys = Keys(namespace, hasher)
        self._endpoints = tuple(endpoints)
        self._tls = tls
        self._values = Values(self._keys, default_ttl, chunked)
        self._exchange: Callable[[Connection, Sequence[Request[Any]]], Exchange[list[Reply]]]
        self._exchange = partial(carry_out, self._values)
        self._connector = Connector(clock=clock, connect_timeout=connect_timeout, timeout=timeout, most=max_connections)
        self._servers: dict[str, Server] = {}
        self._only: Server | None = None
        # The driver has no type hints.
        self._shares: Any = RendezvousHash([str(each) for each in self._endpoints], hash_function=_weight)

    def __repr__(self) -> str:
        return f"<MemcachedStore {self._keys.namespace!r} at {', '.join(map(str, self._endpoints))}>"

    async def open(self) -> None:
        if self._tls is not None:
            context = await to_thread.run_sync(self._tls.context, self.name)
            self._connector = dataclasses.replace(self._connector, tls=context)
        several = len(self._endpoints) > 1
        servers = {str(each): Server(each, self._connector, in_background=several) for each in self._endpoints}
        failures: list[CacheError] = []

        async def connect(server: Server) -> None:
            try:
                await server.connect()
            except CacheError as error:
                failures.append(error)

        try:
            async with anyio.create_task_group() as tasks:
                for server in servers.values():
                    tasks.start_soon(connect, server)
        except BaseException:
            for server in servers.values():
                server.abort()
            raise
        connections = [each.connection for each in servers.values() if each.connection is not None]
        if not connections:
            raise failures[0]
        self._servers = servers
        self._only = None if several else next(iter(servers.values()))
        limit = CHUNKED_MAX if self._values.chunked else min(each.entry_max for each in connections) - HEADER.size
        self.capabilities = msgspec.structs.replace(self.capabilities, max_value_bytes=limit)

    async def close(self) -> None:
        """Finish the batches in flight, then close. If cancelled, close immediately."""
        for server in self._servers.values():
            await server.close()

    def gauges(self) -> Gauges:
        return Gauges()

    # Batches

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        replies = Result()
        await self.submit(batch, replies)
        return cast("Sequence[Reply]", await replies.wait())

    def try_submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress | None:
        """Send a batch, or return `None` without sending if one of its servers is not available immediately."""
        if (server := self._only) is not None:
            connection = server.try_acquire()
            if connection is not None:
                connection.begin(self._exchange(connection, batch), on_replies, len(batch))
            return connection
        shares = self._share_out(batch)
        taken: dict[Server, Connection] = {}
        for server in shares:
            connection = server.try_acquire()
            if connection is None:
                for each in taken:
                    each.release()
                return None
            taken[server] = connection
        join = _Join(batch, shares, on_replies)
        for server, connection in taken.items():
            self._begin(join, connection, shares[server])
        return join

    async def submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        """Send a batch, and wait for connections if necessary.

        Raises `CacheConnectionError` if nothing could be sent.
        """
        if not self._servers:
            raise CacheConnectionError("the store is not open", BACKEND)
        if (server := self._only) is not None:
            connection = await server.acquire()
            connection.begin(self._exchange(connection, batch), on_replies, len(batch))
            return connection
        shares = self._share_out(batch)
        join = _Join(batch, shares, on_replies)

        async def start(server: Server, share: Share) -> None:
            try:
                connection = await server.acquire()
            except CacheError as error:
                join.take(share, [Failed.of(error)] * len(share))
            else:
                self._begin(join, connection, share)

        async with anyio.create_task_group() as tasks:
            for server, share in shares.items():
                tasks.start_soon(start, server, share)
        return join

    # Several servers

    def _begin(self, join: _Join, connection: Connection, share: Share) -> None:
        part = [request for _, request in share]
        join.connections.append(connection)
        connection.begin(self._exchange(connection, part), partial(join.take, share), len(part))

    def _share_out(self, batch: Sequence[Request[Any]]) -> dict[Server, Share]:
        """Return the share of each server."""
        shares: dict[Server, Share] = {}
        for position, request in enumerate(batch):
            for name, part in self._parts(request):
                shares.setdefault(self._servers[name], []).append((position, part))
        return shares

    def _parts(self, request: Any) -> list[tuple[str, Request[Any]]]:
        if isinstance(request, Clear | InvalidateTags):
            return [(name, request) for name in self._servers]
        if not isinstance(request, GetMany | SetMany | DeleteMany):
            return [(self._server(getattr(request, "key", "")), request)]
        by_server: dict[str, list[str]] = {}
        for key in request.items if isinstance(request, SetMany) else request.keys:
            by_server.setdefault(self._server(key), []).append(key)
        if len(by_server) < 2:
            return [(next(iter(by_server), next(iter(self._servers))), request)]
        if isinstance(request, SetMany):
            items, ttl, tags = request.items, request.ttl, request.tags
            return [(name, SetMany({key: items[key] for key in some}, ttl, tags)) for name, some in by_server.items()]
        return [(name, type(request)(tuple(some))) for name, some in by_server.items()]

    def _server(self, key: str) -> str:
        return str(self._shares.get_node(key))


class _Join:
    """A collector of the replies of several servers to their shares of a batch."""

    def __init__(self, batch: Sequence[Request[Any]], shares: dict[Server, Share], on_replies: OnReplies) -> None:
        self.connections: list[Connection] = []
        self._replies: list[Any] = [None] * len(batch)
        self._missing = len(shares)
        self._on_replies = on_replies
        if not shares:
            on_replies([])  # An empty batch.

    @property
    def last_progress(self) -> float:
        return max((each.last_progress for each in self.connections), default=0.0)

    def take(self, share: Share, replies: Sequence[Reply]) -> None:
        for (position, _), reply in zip(share, replies, strict=True):
            self._replies[position] = _merged(self._replies[position], reply)
        self._missing -= 1
        if not self._missing:
            self._on_replies(self._replies)


def _weight(text: str, seed: int) -> int:
    """Return the weight of a key at a server. The driver's hash function is pure Python and twenty times slower."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _merged(one: Reply | None, other: Reply) -> Reply:
    """Merge the replies of two servers to one request."""
    if one is None or isinstance(other, Failed):
        return other
    match one, other:
        case FoundMany(), FoundMany():
            return FoundMany({**one.entries, **other.entries})
        case StoredMany(), StoredMany():
            return StoredMany(one.count + other.count)
        case Deleted(), Deleted():
            return Deleted(one.count + other.count)
        case _:
            return one
