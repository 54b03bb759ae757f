"""The servers of a Redis Cluster: the connections to them, and the map of slots with ways to learn it anew."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

import hiredis

from cachebus.messages import CacheClosed, CacheConfigurationError, CacheConnectionError, CacheError

from .redis_connect import Connector, Endpoint, RedisPool
from .redis_connection import pack
from .redis_errors import BACKEND, translate, unreachable
from .redis_node import Arrived, ClusterNode, Undelivered
from .redis_slots import SlotMap, read_slots

ASKED_AT_ONCE = 4
"""How many servers are asked for the map at a time; the first one that answers is believed."""

LEARN_INTERVAL = 0.05
"""Seconds within which the map is not learned twice, however many commands say that it is wrong."""


class Topology:
    """Which servers there are, and which slots each has. `changed` is told of slots that have another owner now."""

    def __init__(
        self,
        connector: Connector,
        seeds: Sequence[Endpoint],
        most: int,
        arrived: Arrived,
        failed: Undelivered,
        changed: Callable[[Sequence[int]], None],
    ) -> None:
        self.map = SlotMap()
        self._connector = connector
        self._seeds = seeds
        self._most = most
        self._arrived = arrived
        self._failed = failed
        self._changed = changed
        self._nodes: dict[Endpoint, ClusterNode] = {}
        self._learning: asyncio.Task[None] | None = None
        self._learned_at = float("-inf")
        self._leaving: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Topology {self.map!r}, {len(self._nodes)} known>"

    def node(self, place: Endpoint) -> ClusterNode:
        """The server at a place."""
        node = self._nodes.get(place)
        if node is None:
            pool = RedisPool(lambda: self._connector.connect(place), self._most)
            node = self._nodes[place] = ClusterNode(place, pool, self._arrived, self._failed)
        return node

    def node_of(self, slot: int) -> ClusterNode | None:
        """The server that has a slot, if one has."""
        try:
            return self.node(self.map.place(slot))
        except CacheConnectionError:
            return None

    async def learn(self) -> None:
        """Ask for the map. Raises `CacheConnectionError` when no server of the cluster can be reached, and
        `CacheConfigurationError` when those that can will not have us."""
        if self._closed and self._learning is None:
            raise CacheClosed("the connection to redis was closed")
        await asyncio.shield(self._begin_to_learn())

    def learn_soon(self) -> None:
        """Ask for the map beside everything else, if that is not under way or only just over."""
        if not self._closed and self._connector.clock.monotonic() - self._learned_at >= LEARN_INTERVAL:
            self._begin_to_learn()

    def _begin_to_learn(self) -> asyncio.Task[None]:
        if self._learning is None:
            self._learning = asyncio.create_task(self._learn())
            self._learning.add_done_callback(self._learned)
        return self._learning

    async def close(self) -> None:
        """Finish what is under way, then close; cancelled, break it off."""
        self._closed = True
        if self._learning is not None:
            self._learning.cancel()
        for node in list(self._nodes.values()):
            await node.close()

    def drop(self) -> None:
        """Give everything up."""
        self._closed = True
        for task in (self._learning, *self._leaving):
            if task is not None:
                task.cancel()
        for node in self._nodes.values():
            node.drop(CacheClosed("the connection to redis was closed"))

    def _learned(self, task: asyncio.Task[None]) -> None:
        self._learning = None
        self._learned_at = self._connector.clock.monotonic()
        if not task.cancelled():
            task.exception()  # Whoever waited was told; nobody may have.

    async def _learn(self) -> None:
        errors: list[CacheError] = []
        known = sorted(self._nodes, key=lambda place: self._nodes[place].pool.up() is None)
        candidates = list(dict.fromkeys((*known, *self._seeds)))
        for start in range(0, len(candidates), ASKED_AT_ONCE):
            asked = [asyncio.create_task(self._ask(place)) for place in candidates[start : start + ASKED_AT_ONCE]]
            try:
                for next_one in asyncio.as_completed(asked):
                    try:
                        owners = await next_one
                    except CacheError as error:
                        errors.append(error)
                        continue
                    self._take_in(owners)
                    return
            finally:
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
        permanent = [error for error in errors if isinstance(error, CacheConfigurationError)]
        if permanent:
            raise permanent[0]
        raise CacheConnectionError(
            f"no server of the cluster says who has which slots: {'; '.join(error.detail for error in errors)}", BACKEND
        )

    async def _ask(self, place: Endpoint) -> dict[int, Endpoint]:
        """The owners of all slots, by one server."""
        node = self._nodes.get(place)
        try:
            async with asyncio.timeout(self._connector.timeout):
                connection = await (self._connector.connect(place) if node is None else node.pool.connect())
                try:
                    # Beyond the window, if need be: a server that is busy is asked all the same.
                    (reply,) = await connection.ask(pack("CLUSTER", "SLOTS"))
                finally:
                    if node is None:
                        connection.drop(CacheConnectionError("done", BACKEND))
        except TimeoutError as error:
            raise unreachable(error, str(place), self._connector.timeout) from None
        if isinstance(reply, hiredis.ReplyError):
            if "cluster support disabled" in str(reply):
                raise CacheConfigurationError(f"redis: {place} is in no cluster: its URL begins with redis://")
            raise translate(reply)
        owners = read_slots(reply, place)
        if not owners:
            raise CacheConnectionError(f"{place} knows of no server that has slots", BACKEND)
        return owners

    def _take_in(self, owners: dict[int, Endpoint]) -> None:
        if changed := self.map.replace(owners):
            self._changed(changed)
        places = set(self.map.places())
        for place in [place for place, node in self._nodes.items() if place not in places and node.idle]:
            leaving = asyncio.create_task(self._nodes.pop(place).close())
            self._leaving.add(leaving)
            leaving.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._leaving.discard(task)
        if not task.cancelled():
            with contextlib.suppress(CacheError):
                task.result()
