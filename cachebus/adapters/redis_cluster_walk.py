"""Walks over the keys of a namespace in a Redis Cluster, server by server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from cachebus.actors.ports import Replied
from cachebus.messages import (
    BadMessage,
    CacheConnectionError,
    CacheError,
    Cleared,
    Deleted,
    DeleteMany,
    DeletePattern,
    Failed,
    Reply,
    Request,
    Scan,
    Scanned,
)

from .redis_errors import BACKEND
from .redis_topology import Topology
from .redis_walk import matching, remove_matching, scan_words

MOST_WALKS = 3
"""How often a walk begins anew because slots have changed hands during it."""

_CURSOR = re.compile(r"([0-9]{1,20})@(.+)", re.DOTALL)

Execute = Callable[[Sequence[Request[Any]]], Awaitable[Sequence[Reply]]]


class ClusterWalks:
    """The walks under way: `Clear`, `DeletePattern`, and the pages of `Scan`.

    Servers are walked over in the order of their names. A walk that removes begins anew if slots have changed hands
    meanwhile. A key that is being moved while both servers are walked over may be missed: by a scan it is not listed, by a
    clear it is not removed.
    """

    def __init__(self, topology: Topology, prefix: str, execute: Execute) -> None:
        self._topology = topology
        self._prefix = prefix
        self._execute = execute
        self._under_way: set[asyncio.Task[None]] = set()

    def start(self, batch: Sequence[Request[Any]], kinds: frozenset[type[Request[Any]]], replied: Replied) -> None:
        """Carry out a batch with walks in it, beside everything else. `kinds` are the walks."""
        task = asyncio.create_task(self._run(batch, kinds, replied))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def finish(self) -> None:
        """Wait until no walk is under way."""
        while self._under_way:
            await asyncio.wait(self._under_way)

    def cancel(self) -> None:
        """Break off every walk."""
        for task in self._under_way:
            task.cancel()

    async def _run(self, batch: Sequence[Request[Any]], kinds: frozenset[type[Request[Any]]], replied: Replied) -> None:
        replies: list[Any] = [None] * len(batch)
        try:
            for at, request in enumerate(batch):
                if type(request) in kinds:
                    replies[at] = await self._walk(request)
            beside = [at for at, reply in enumerate(replies) if reply is None]
            if beside:
                for at, reply in zip(beside, await self._execute([batch[at] for at in beside]), strict=True):
                    replies[at] = reply
        except CacheError as error:
            replies = [Failed.of(error) if reply is None else reply for reply in replies]
        except asyncio.CancelledError:
            replied([Failed.of(CacheConnectionError("the store was closed", BACKEND))] * len(batch))
            raise
        replied(replies)

    async def _walk(self, request: Request[Any]) -> Reply:
        try:
            if isinstance(request, Scan):
                return await self._page(request)
            if isinstance(request, DeletePattern):
                return Deleted(await self._remove(request.pattern))
            await self._remove("*")
            return Cleared()
        except CacheError as error:
            self._topology.learn_soon()
            return Failed.of(error)

    async def _remove(self, pattern: str) -> int:
        removed = 0
        for _ in range(MOST_WALKS):
            version = self._topology.map.version
            for place in self._topology.map.places():
                connection = await self._topology.node(place).pool.side()
                removed += await remove_matching(connection, self._prefix, pattern, self._delete)
            if self._topology.map.version == version:
                break
        return removed

    async def _delete(self, keys: Sequence[str]) -> int:
        # By the way of every other request, which follows keys that have moved since they were listed.
        (reply,) = await self._execute([DeleteMany(tuple(keys))])
        if isinstance(reply, Failed):
            raise reply.error()
        return reply.count if isinstance(reply, Deleted) else 0

    async def _page(self, request: Scan) -> Reply:
        places = self._topology.map.places()
        names = [str(place) for place in places]
        cursor, at = "0", 0
        if request.cursor:
            found = _CURSOR.fullmatch(request.cursor)
            if found is None:
                raise BadMessage(f"the cursor {request.cursor[:40]!r} is none that a scan gave")
            if found[2] not in names:
                raise CacheConnectionError("the cluster has changed during the scan: begin it anew", BACKEND)
            cursor, at = found[1], names.index(found[2])
        connection = await self._topology.node(places[at]).pool.main()
        following, listed = await connection.call(*scan_words(self._prefix, request.pattern, cursor))
        keys = tuple(matching(listed, self._prefix, request.pattern))
        if following != b"0":
            return Scanned(keys, f"{following.decode()}@{names[at]}")
        return Scanned(keys, f"0@{names[at + 1]}" if at + 1 < len(names) else "")
