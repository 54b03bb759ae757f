"""Walks over the keys of a namespace in a Redis Cluster, server by server."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

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
    """Walks of all kinds: `Clear`, `DeletePattern`, and the pages of `Scan`.

    Servers are walked over in the order of their names. A walk that removes begins anew if slots have changed hands
    meanwhile. A key that is being moved while both servers are walked over may be missed: by a scan it is not listed, by a
    clear it is not removed.
    """

    def __init__(self, topology: Topology, prefix: str, execute: Execute) -> None:
        self._topology = topology
        self._prefix = prefix
        self._execute = execute

    async def walk(self, request: Request[Any]) -> Reply:
        """Carry out one. Raises `CacheError`."""
        try:
            if isinstance(request, Scan):
                return await self._page(request)
            if isinstance(request, DeletePattern):
                return Deleted(await self._remove(request.pattern))
            await self._remove("*")
            return Cleared()
        except CacheError:
            self._topology.learn_soon()
            raise

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
        connection = await self._topology.node(places[at]).pool.connect()
        following, listed = await connection.call(*scan_words(self._prefix, request.pattern, cursor))
        keys = tuple(matching(listed, self._prefix, request.pattern))
        if following != b"0":
            return Scanned(keys, f"{following.decode()}@{names[at]}")
        return Scanned(keys, f"0@{names[at + 1]}" if at + 1 < len(names) else "")
