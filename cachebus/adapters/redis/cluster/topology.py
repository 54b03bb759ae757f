"""Servers of a Redis Cluster, their command queues, and the map of slots."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import hiredis

from cachebus.messages import CacheConfigurationError, CacheConnectionError, CacheError

from ..commands import RoutedCommand
from ..connect import Connector, Endpoint, RedisPool
from ..connection import PendingReplies, RedisConnection, pack
from ..errors import BACKEND, closed, translate, unreachable

ASKED_AT_ONCE = 4  # Number of servers asked for the map at a time. The first answer is used.
LEARN_INTERVAL = 0.05  # Minimum seconds between two updates of the map, however many commands are redirected.
_ASKING = pack("ASKING")


class SlotMap:
    """Last known owner of each slot. `version` increases when a slot has a new owner."""

    def __init__(self) -> None:
        self.version = 0
        self._owners: dict[int, Endpoint] = {}

    def __repr__(self) -> str:
        return f"<SlotMap of {len(self._owners)} slots at {len(self.places())} servers>"

    def place(self, slot: int) -> Endpoint:
        """Return the owner of a slot. Raises `CacheConnectionError` if none is known."""
        owner = self._owners.get(slot)
        if owner is None:
            raise CacheConnectionError(f"no server of the cluster owns slot {slot}", BACKEND)
        return owner

    def places(self) -> list[Endpoint]:
        """Return every server that owns slots, sorted by name."""
        return sorted(set(self._owners.values()), key=str)

    def move(self, slot: int, place: Endpoint) -> bool:
        """Record the owner of a slot. Return `False` if it was already known."""
        if self._owners.get(slot) == place:
            return False
        self._owners[slot] = place
        self.version += 1
        return True

    def replace(self, owners: dict[int, Endpoint]) -> list[int]:
        """Replace the whole map. Return the slots whose owner has changed."""
        changed = [slot for slot, place in owners.items() if self._owners.get(slot) != place]
        self._owners = owners
        self.version += bool(changed)
        return changed


def read_slots(reply: Any, asked: Endpoint) -> dict[int, Endpoint]:
    """Return the owners of all slots from the reply of the server `asked` to `CLUSTER SLOTS`."""
    owners: dict[int, Endpoint] = {}
    for first, last, (host, port, *_), *_ in reply:
        # A server that does not know its own host sends none: use the host it was reached at.
        place = Endpoint(asked.host if host in (None, b"", b"?") else host.decode(), int(port))
        owners.update(dict.fromkeys(range(first, last + 1), place))
    return owners


def read_redirection(reply: str, asked: Endpoint) -> tuple[int, Endpoint]:
    """Parse a redirection such as `MOVED 3999 10.0.0.1:6381` from the server `asked` into slot and endpoint."""
    _, slot, target = reply.split(" ")[:3]
    host, _, port = target.rpartition(":")
    return int(slot), Endpoint(asked.host if host in ("", "?") else host, int(port))


Arrived = Callable[["ClusterNode", RoutedCommand, Any, float], None]
"""Callback for a reply: the server, the command, the reply, and the server's Unix time in seconds."""

Undelivered = Callable[[Sequence[RoutedCommand], CacheError, bool], None]
"""Callback for commands without a reply: the commands, the error, and whether they were sent."""


class ClusterNode:
    """Server of a cluster: its connections and a FIFO queue of commands.

    `arrived` or `failed` is called once for each command.
    """

    def __init__(self, place: Endpoint, pool: RedisPool, arrived: Arrived, failed: Undelivered) -> None:
        self.place = place
        self.pool = pool
        self._arrived = arrived
        self._failed = failed
        self._queue: deque[Sequence[RoutedCommand]] = deque()
        self._pump: asyncio.Task[None] | None = None
        self._trial: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<ClusterNode {self.place}, {len(self._queue)} waiting, {self.pool!r}>"

    @property
    def has_room(self) -> bool:
        """True if commands can be sent now."""
        connection = self.pool.up()
        return not self._queue and connection is not None and connection.has_room

    @property
    def idle(self) -> bool:
        """True if no command is queued or in flight."""
        return not self._queue and self._pump is None and not any(each.in_flight for each in self.pool.connections)

    @property
    def trouble(self) -> CacheError | None:
        """Error of the last connection attempt, if there is no connection."""
        return self.pool.trouble if self.pool.up() is None else None

    def try_again(self) -> None:
        """Connect in the background.

        Waiting for an unresponsive server delays a batch by the connection timeout, so only the first batches wait.
        """

        async def connect() -> None:
            with contextlib.suppress(CacheError):  # The pool keeps the error in `trouble`.
                await self.pool.ready()

        if self._trial is None or self._trial.done():
            self._trial = asyncio.create_task(connect())

    async def room(self) -> None:
        """Wait until commands can be sent. Raises `CacheConnectionError` if the server cannot be reached."""
        while not self.has_room:
            if self._pump is not None:
                await asyncio.wait([self._pump])
                continue
            await self.pool.ready()

    def send(self, trips: Sequence[RoutedCommand]) -> None:
        """Send commands after those already queued, without waiting."""
        connection = self.pool.up()
        if connection is not None and self.has_room:
            self._write(connection, trips)
            return
        self._queue.append(trips)
        if self._pump is None:
            self._pump = asyncio.create_task(self._send_waiting())

    async def close(self) -> None:
        """Wait for pending commands, then close. If cancelled, abort them and close."""
        if self._trial is not None:
            self._trial.cancel()
        try:
            while self._pump is not None:
                await asyncio.wait([self._pump])
            await self.pool.close()
        finally:
            self.drop()

    def drop(self) -> None:
        """Abort pending commands and close every connection."""
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
            # Fail the whole queue: each batch would wait as long for the same error.
            waiting = [trip for trips in self._queue for trip in trips]
            self._queue.clear()
            self._pump = None  # The callbacks may queue commands and need a new task.
            self._failed(waiting, error, False)
        finally:
            if self._pump is asyncio.current_task():
                self._pump = None

    def _write(self, connection: RedisConnection, trips: Sequence[RoutedCommand]) -> None:
        wanted = len(trips) + sum(trip.asking for trip in trips)
        data = b"".join([_ASKING + trip.packed if trip.asking else trip.packed for trip in trips])

        def answered(replies: Sequence[Any] | CacheError) -> None:
            for trip in trips:
                trip.connection = None
            if isinstance(replies, CacheError):
                self._failed(trips, replies, True)
                return
            now = connection.now()
            at = -1
            for trip in trips:
                at += 1 + trip.asking  # Skip the reply to `ASKING`.
                self._arrived(self, trip, replies[at], now)

        for trip in trips:
            trip.connection = connection
        connection.send(data, PendingReplies(wanted, answered))


class Topology:
    """Servers of a cluster and the slots of each. `changed` is called with the slots that have a new owner."""

    def __init__(
        self,
        connector: Connector,
        seeds: Sequence[Endpoint],
        make_node: Callable[[Endpoint], ClusterNode],
        changed: Callable[[Sequence[int]], None],
    ) -> None:
        self.map = SlotMap()
        self._connector = connector
        self._seeds = seeds
        self._make_node = make_node
        self._changed = changed
        self._nodes: dict[Endpoint, ClusterNode] = {}
        self._learning: asyncio.Task[None] | None = None
        self._learned_at = float("-inf")
        self._leaving: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Topology {self.map!r}, {len(self._nodes)} known>"

    def node(self, place: Endpoint) -> ClusterNode:
        """Return the server at an endpoint."""
        if place not in self._nodes:
            self._nodes[place] = self._make_node(place)
        return self._nodes[place]

    def node_of(self, slot: int) -> ClusterNode | None:
        """Return the server that owns a slot, if one is known."""
        try:
            return self.node(self.map.place(slot))
        except CacheConnectionError:
            return None

    async def learn(self) -> None:
        """Update the map of slots.

        Raises `CacheConnectionError` if no server of the cluster can be reached, and `CacheConfigurationError` if the
        reachable servers reject the connection.
        """
        if self._closed and self._learning is None:
            raise closed()
        await asyncio.shield(self._begin_to_learn())

    def learn_soon(self) -> None:
        """Update the map in the background, unless an update is running or has just finished."""
        if not self._closed and self._connector.clock.monotonic() - self._learned_at >= LEARN_INTERVAL:
            self._begin_to_learn()

    def _begin_to_learn(self) -> asyncio.Task[None]:
        if self._learning is None:
            self._learning = asyncio.create_task(self._learn())
            self._learning.add_done_callback(self._learned)
        return self._learning

    def _learned(self, task: asyncio.Task[None]) -> None:
        self._learning = None
        self._learned_at = self._connector.clock.monotonic()
        if not task.cancelled():
            task.exception()  # Mark the error as retrieved. Waiters, if any, received it.

    async def close(self) -> None:
        """Wait for pending commands, then close. If cancelled, abort them and close."""
        self._closed = True
        if self._learning is not None:
            self._learning.cancel()
        for node in list(self._nodes.values()):
            await node.close()

    def drop(self) -> None:
        """Abort pending commands and close every server."""
        self._closed = True
        for task in (self._learning, *self._leaving):
            if task is not None:
                task.cancel()
        for node in self._nodes.values():
            node.drop()

    async def _learn(self) -> None:
        errors: list[CacheError] = []
        known = sorted(self._nodes, key=lambda place: self._nodes[place].pool.up() is None)
        candidates = list(dict.fromkeys((*known, *self._seeds)))
        for start in range(0, len(candidates), ASKED_AT_ONCE):
            asked = [asyncio.create_task(self._ask(place)) for place in candidates[start : start + ASKED_AT_ONCE]]
            try:
                for next_one in asyncio.as_completed(asked):
                    try:
                        self._take_in(await next_one)
                        return
                    except CacheError as error:
                        errors.append(error)
            finally:
                for task in asked:
                    task.cancel()
                await asyncio.gather(*asked, return_exceptions=True)
        for permanent in errors:
            if isinstance(permanent, CacheConfigurationError):
                raise permanent
        reasons = "; ".join(error.detail for error in errors)
        raise CacheConnectionError(f"no server of the cluster returned the map of slots: {reasons}", BACKEND)

    async def _ask(self, place: Endpoint) -> dict[int, Endpoint]:
        """Query one server for the owners of all slots."""
        node = self._nodes.get(place)
        try:
            async with asyncio.timeout(self._connector.timeout):
                connection = await (self._connector.connect(place) if node is None else node.pool.connect())
                try:
                    # Ignores the window, so that a busy server is asked too.
                    (reply,) = await connection.ask(pack("CLUSTER", "SLOTS"))
                finally:
                    if node is None:
                        connection.drop(CacheConnectionError("done", BACKEND))
        except TimeoutError as error:
            raise unreachable(error, str(place), self._connector.timeout) from None
        if isinstance(reply, hiredis.ReplyError):
            if "cluster support disabled" in str(reply):
                raise CacheConfigurationError(f"redis: {place} is not part of a cluster; use a redis:// URL")
            raise translate(reply)
        owners = read_slots(reply, place)
        if not owners:
            raise CacheConnectionError(f"{place} knows no server that owns slots", BACKEND)
        return owners

    def _take_in(self, owners: dict[int, Endpoint]) -> None:
        if changed := self.map.replace(owners):
            self._changed(changed)
        places = set(self.map.places())
        for place in [place for place, node in self._nodes.items() if place not in places and node.idle]:
            leaving = asyncio.create_task(self._leave(self._nodes.pop(place)))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _leave(self, node: ClusterNode) -> None:
        with contextlib.suppress(CacheError):
            await node.close()
