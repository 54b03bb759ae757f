"""The Memcached store: batches of requests over one server or several, in a namespace of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import anyio
import msgspec
from anyio import to_thread
from pymemcache.client.rendezvous import RendezvousHash

from cachebus.actors.ports import SYSTEM_CLOCK, Capabilities, Clock, Gauges
from cachebus.messages import (
    CacheConnectionError,
    CacheError,
    Clear,
    Cleared,
    Deleted,
    DeleteMany,
    Failed,
    FoundMany,
    GetMany,
    Invalidated,
    InvalidateTags,
    Reply,
    Request,
    SetMany,
    StoredMany,
)

from .memcached_chunks import CHUNKED_MAX
from .memcached_connection import Dial, Place
from .memcached_entries import HEADER
from .memcached_errors import BACKEND
from .memcached_keys import Hasher, Keys, blake
from .memcached_lane import Lane, common
from .memcached_plan import Plan
from .memcached_session import Session
from .memcached_tags import invalidate
from .memcached_values import Values
from .tls import TlsFiles

__all__ = ["MemcachedStore", "Place", "TlsFiles"]


class MemcachedStore:
    """A `BatchStore` in one or several Memcached servers, version 1.6.10 or newer, on asyncio and on trio.

    The keys of several servers are shared out by rendezvous hashing: a server that comes or goes moves its own keys only,
    and one that does not answer costs its own keys only. Every server has a generation of the namespace, which `Clear`
    makes anew on each, and one of every tag. Times to live are rounded up to whole seconds.
    """

    name = BACKEND

    def __init__(
        self,
        places: Sequence[Place],
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
        self.capabilities = Capabilities(
            tags=True,
            compare_and_set=True,
            counters=True,
            leases=True,
            rate_limits=True,
            locks=True,
            ttl_resolution=1.0,
        )
        self._keys = Keys(namespace, hasher)
        self._places = tuple(places)
        self._tls = tls
        self._values = Values(self._keys, default_ttl, chunked)
        self._max_connections = max_connections
        self._dial = Dial(clock=clock, connect_timeout=connect_timeout, timeout=timeout)
        self._lanes: dict[str, Lane] = {}
        # The driver comes without type hints.
        self._shares: Any = RendezvousHash([str(place) for place in self._places], hash_function=_weight)

    def __repr__(self) -> str:
        return f"<MemcachedStore {self._keys.namespace!r} at {', '.join(map(str, self._places))}>"

    async def open(self) -> None:
        if self._tls is not None:
            context = await to_thread.run_sync(self._tls.context, self.name)
            self._dial = dataclasses.replace(self._dial, tls=context)
        several = len(self._places) > 1
        self._lanes = {
            str(place): Lane(place, self._dial, self._max_connections, aside=several) for place in self._places
        }
        failures: list[CacheError] = []

        async def connect(lane: Lane) -> None:
            try:
                await lane.connect()
            except CacheError as error:
                failures.append(error)

        async with anyio.create_task_group() as tasks:
            for lane in self._lanes.values():
                tasks.start_soon(connect, lane)
        limit = common(list(self._lanes.values()), lambda connection: connection.entry_max)
        if limit is None:
            raise failures[0]
        self.capabilities = msgspec.structs.replace(
            self.capabilities, max_value_bytes=CHUNKED_MAX if self._values.chunked else limit - HEADER.size
        )

    async def close(self) -> None:
        """Finish what is under way, then close; cancelled, break it off."""
        for lane in self._lanes.values():
            await lane.close()

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        if not self._lanes:
            raise CacheConnectionError("the store is not open", BACKEND)
        if len(self._lanes) == 1 and not any(type(request) in _EVERYWHERE for request in batch):
            (lane,) = self._lanes.values()
            return await self._on(lane, batch)
        replies: list[Reply] = []
        part: list[Request[Any]] = []
        for request in batch:
            if type(request) in _EVERYWHERE:
                replies += await self._shared_out(part)
                replies.append(await self._everywhere(request))
                part = []
            else:
                part.append(request)
        return replies + await self._shared_out(part)

    async def _on(self, lane: Lane, batch: Sequence[Request[Any]]) -> list[Reply]:
        """The replies of one server."""

        return await lane.run(lambda connection: Plan(connection, self._values, batch).run())

    async def _everywhere(self, request: Any) -> Reply:
        """The reply to what every server has to do."""
        failures: list[CacheError] = []

        async def ask(lane: Lane) -> None:
            try:
                if isinstance(request, InvalidateTags):
                    await lane.run(lambda connection: invalidate(Session(connection, self._keys), request.tags))
                else:
                    await lane.run(lambda connection: Session(connection, self._keys).clear())
            except CacheError as error:
                failures.append(error)

        async with anyio.create_task_group() as tasks:
            for lane in self._lanes.values():
                tasks.start_soon(ask, lane)
        if failures:
            return Failed.of(failures[0])
        return Invalidated() if isinstance(request, InvalidateTags) else Cleared()

    async def _shared_out(self, batch: Sequence[Request[Any]]) -> list[Reply]:
        """The replies of the servers to their parts of a batch."""
        if not batch:
            return []
        shares: dict[str, list[tuple[int, Request[Any]]]] = {}
        for position, request in enumerate(batch):
            for server, part in self._parts(request):
                shares.setdefault(server, []).append((position, part))
        replies: list[Any] = [None] * len(batch)

        async def ask(lane: Lane, share: Sequence[tuple[int, Request[Any]]]) -> None:
            try:
                told: Sequence[Reply] = await self._on(lane, [request for _, request in share])
            except CacheError as error:
                told = [Failed.of(error)] * len(share)
            for (position, _), reply in zip(share, told, strict=True):
                replies[position] = _merged(replies[position], reply)

        async with anyio.create_task_group() as tasks:
            for server, share in shares.items():
                tasks.start_soon(ask, self._lanes[server], share)
        return replies

    def _parts(self, request: Any) -> list[tuple[str, Request[Any]]]:
        """Which servers a request is for, and what each is to do."""
        first = next(iter(self._lanes))
        if len(self._lanes) == 1:
            return [(first, request)]
        if not isinstance(request, GetMany | SetMany | DeleteMany):
            return [(self._server(getattr(request, "key", "")), request)]
        keys = request.items if isinstance(request, SetMany) else request.keys
        by_server: dict[str, list[str]] = {}
        for key in keys:
            by_server.setdefault(self._server(key), []).append(key)
        if len(by_server) < 2:
            return [(next(iter(by_server), first), request)]
        if isinstance(request, SetMany):
            return [
                (server, SetMany({key: request.items[key] for key in some}, request.ttl, request.tags))
                for server, some in by_server.items()
            ]
        return [(server, type(request)(tuple(some))) for server, some in by_server.items()]

    def _server(self, key: str) -> str:
        server: str = self._shares.get_node(key)
        return server


_EVERYWHERE = frozenset[type[Request[Any]]]({Clear, InvalidateTags})
"""What is for all servers, and stands between its neighbours in a batch."""


def _weight(text: str, seed: int) -> int:
    """What a key weighs at a server. The driver's own hash is written in Python, and takes twenty times as long."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def _merged(one: Reply | None, other: Reply) -> Reply:
    """The reply to a request that two servers have a part in."""
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
