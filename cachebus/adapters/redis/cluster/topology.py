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

QUERIED_AT_ONCE = 4  # Number of servers asked for the map at a time. The first answer is used.
UPDATE_INTERVAL = 0.05  # Minimum seconds between two updates of the map, however many commands are redirected.
_ASKING = pack("ASKING")


class SlotMap:
    """Last known owner of each slot. `version` increases when a slot has a new owner."""

    def __init__(self) -> None:
        self.version = 0
        self._owners: dict[int, Endpoint] = {}

    def __repr__(self) -> str:
        return f"<SlotMap of {len(self._owners)} slots at {len(self.endpoints())} servers>"

    def owner(self, slot: int) -> Endpoint:
        """Return the owner of a slot. Raises `CacheConnectionError` if none is known."""
        owner = self._owners.get(slot)
        if owner is None:
            raise CacheConnectionError(f"no server of the cluster owns slot {slot}", BACKEND)
        return owner

    def endpoints(self) -> list[Endpoint]:
        """Return every server that owns slots, sorted by name."""
        return sorted(set(self._owners.values()), key=str)

    def move(self, slot: int, endpoint: Endpoint) -> bool:
        """Record the owner of a slot. Return `False` if it was already known."""
        if self._owners.get(slot) == endpoint:
            return False
        self._owners[slot] = endpoint
        self.version += 1
        return True

    def replace(self, owners: dict[int, Endpoint]) -> list[int]:
        """Replace the whole map. Return the slots whose owner has changed."""
        changed = [slot for slot, endpoint in owners.items() if self._owners.get(slot) != endpoint]
        self._owners = owners
        self.version += bool(changed)
        return changed


def read_slots(reply: Any, asked: Endpoint) -> dict[int, Endpoint]:
    """Return the owners of all slots from the reply of the server `asked` to `CLUSTER SLOTS`."""
    owners: dict[int, Endpoint] = {}
    for first, last, (host, port, *_), *_ in reply:
        # A server that does not know its own host sends none: use the host it was reached at.
        endpoint = Endpoint(asked.host if host in (None, b"", b"?") else host.decode(), int(port))
        owners.update(dict.fromkeys(range(first, last + 1), endpoint))
    return owners


def read_redirection(reply: str, asked: Endpoint) -> tuple[int, Endpoint]:
    """Parse a redirection such as `MOVED 3999 10.0.0.1:6381` from the server `asked` into slot and endpoint."""
    _, slot, target = reply.split(" ")[:3]
    host, _, port = target.rpartition(":")
    return int(slot), Endpoint(asked.host if host in ("", "?") else host, int(port))


OnNodeReply = Callable[["ClusterNode", RoutedCommand, Any, float], None]
"""Callback for a reply: the server, the command, the reply, and the server's Unix time in seconds."""

OnUndelivered = Callable[[Sequence[RoutedCommand], CacheError, bool], None]
"""Callback for commands without a reply: the commands, the error, and whether they were sent."""


class ClusterNode:
    """Server of a cluster: its connections and a FIFO queue of commands.

    `arrived` or `failed` is called once for each command.
    """

    def __init__(self, endpoint: Endpoint, pool: RedisPool, arrived: OnNodeReply, failed: OnUndelivered) -> None:
        self.endpoint = endpoint
        self.pool = pool
        self._on_reply = arrived
        self._failed = failed
        self._queue: deque[Sequence[RoutedCommand]] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._reconnect: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<ClusterNode {self.endpoint}, {len(self._queue)} waiting, {self.pool!r}>"

    @property
    def has_room(self) -> bool:
        """True if commands can be sent now."""
        connection = self.pool.up()
        return not self._queue and connection is not None and connection.has_room

    @property
    def idle(self) -> bool:
        """True if no command is queued or in flight."""
        return not self._queue and self._sender is None and not any(each.in_flight for each in self.pool.connections)

    @property
    def connect_error(self) -> CacheError | None:
        """Error of the last connection attempt, if there is no connection."""
        return self.pool.connect_error if self.pool.up() is None else None

    def try_again(self) -> None:
        """Connect in the background.

        Waiting for an unresponsive server delays a batch by the connection timeout, so only the first batches wait.
        """

        async def connect() -> None:
            with contextlib.suppress(CacheError):  # The pool keeps the error in `connect_error`.
                await self.pool.ready()

        if self._reconnect is None or self._reconnect.done():
            self._reconnect = asyncio.create_task(connect())

    async def room(self) -> None:
        """Wait until commands can be sent. Raises `CacheConnectionError` if the server cannot be reached."""
        while not self.has_room:
            if self._sender is not None:
                await asyncio.wait([self._sender])
                continue
            await self.pool.ready()

    def send(self, routed_commands: Sequence[RoutedCommand]) -> None:
        """Send commands after those already queued, without waiting."""
        connection = self.pool.up()
        if connection is not None and self.has_room:
            self._write(connection, routed_commands)
            return
        self._queue.append(routed_commands)
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_waiting())

    async def close(self) -> None:
        """Wait for pending commands, then close. If cancelled, abort them and close."""
        if self._reconnect is not None:
            self._reconnect.cancel()
        try:
            while self._sender is not None:
                await asyncio.wait([self._sender])
            await self.pool.close()
        finally:
            self.drop()

    def drop(self) -> None:
        """Abort pending commands and close every connection."""
        for task in (self._sender, self._reconnect):
            if task is not None:
                task.cancel()
        self._sender = None
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
            waiting = [routed for routed_commands in self._queue for routed in routed_commands]
            self._queue.clear()
            self._sender = None  # The callbacks may queue commands and need a new task.
            self._failed(waiting, error, False)
        finally:
            if self._sender is asyncio.current_task():
                self._sender = None

    def _write(self, connection: RedisConnection, routed_commands: Sequence[RoutedCommand]) -> None:
        wanted = len(routed_commands) + sum(routed.asking for routed in routed_commands)
        data = b"".join([_ASKING + routed.packed if routed.asking else routed.packed for routed in routed_commands])

        def answered(replies: Sequence[Any] | CacheError) -> None:
            for routed in routed_commands:
                routed.connection = None
            if isinstance(replies, CacheError):
                self._failed(routed_commands, replies, True)
                return
            now = connection.now()
            at = -1
            for routed in routed_commands:
                at += 1 + routed.asking  # Skip the reply to `ASKING`.
                self._on_reply(self, routed, replies[at], now)

        for routed in routed_commands:
            routed.connection = connection
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
        self._updating: asyncio.Task[None] | None = None
        self._updated_at = float("-inf")
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<Topology {self.map!r}, {len(self._nodes)} known>"

    def node(self, endpoint: Endpoint) -> ClusterNode:
        """Return the server at an endpoint."""
        if endpoint not in self._nodes:
            self._nodes[endpoint] = self._make_node(endpoint)
        return self._nodes[endpoint]

    def node_of(self, slot: int) -> ClusterNode | None:
        """Return the server that owns a slot, if one is known."""
        try:
            return self.node(self.map.owner(slot))
        except CacheConnectionError:
            return None

    async def update(self) -> None:
        """Update the map of slots.

        Raises `CacheConnectionError` if no server of the cluster can be reached, and `CacheConfigurationError` if the
        reachable servers reject the connection.
        """
        if self._closed and self._updating is None:
            raise closed()
        await asyncio.shield(self._begin_update())

    def update_soon(self) -> None:
        """Update the map in the background, unless an update is running or has just finished."""
        if not self._closed and self._connector.clock.monotonic() - self._updated_at >= UPDATE_INTERVAL:
            self._begin_update()

    def _begin_update(self) -> asyncio.Task[None]:
        if self._updating is None:
            self._updating = asyncio.create_task(self._update())
            self._updating.add_done_callback(self._update_done)
        return self._updating

    def _update_done(self, task: asyncio.Task[None]) -> None:
        self._updating = None
        self._updated_at = self._connector.clock.monotonic()
        if not task.cancelled():
            task.exception()  # Mark the error as retrieved. Waiters, if any, received it.

    async def close(self) -> None:
        """Wait for pending commands, then close. If cancelled, abort them and close."""
        self._closed = True
        if self._updating is not None:
            self._updating.cancel()
        for node in list(self._nodes.values()):
            await node.close()

    def drop(self) -> None:
        """Abort pending commands and close every server."""
        self._closed = True
        for task in (self._updating, *self._closing):
            if task is not None:
                task.cancel()
        for node in self._nodes.values():
            node.drop()

    async def _update(self) -> None:
        errors: list[CacheError] = []
        known = sorted(self._nodes, key=lambda endpoint: self._nodes[endpoint].pool.up() is None)
        candidates = list(dict.fromkeys((*known, *self._seeds)))
        for start in range(0, len(candidates), QUERIED_AT_ONCE):
            asked = [
                asyncio.create_task(self._query(endpoint)) for endpoint in candidates[start : start + QUERIED_AT_ONCE]
            ]
            try:
                for next_one in asyncio.as_completed(asked):
                    try:
                        self._apply(await next_one)
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

    async def _query(self, endpoint: Endpoint) -> dict[int, Endpoint]:
        """Query one server for the owners of all slots."""
        node = self._nodes.get(endpoint)
        try:
            async with asyncio.timeout(self._connector.timeout):
                connection = await (self._connector.connect(endpoint) if node is None else node.pool.connect())
                try:
                    # Ignores the window, so that a busy server is asked too.
                    (reply,) = await connection.ask(pack("CLUSTER", "SLOTS"))
                finally:
                    if node is None:
                        connection.drop(CacheConnectionError("done", BACKEND))
        except TimeoutError as error:
            raise unreachable(error, str(endpoint), self._connector.timeout) from None
        if isinstance(reply, hiredis.ReplyError):
            if "cluster support disabled" in str(reply):
                raise CacheConfigurationError(f"redis: {endpoint} is not part of a cluster; use a redis:// URL")
            raise translate(reply)
        owners = read_slots(reply, endpoint)
        if not owners:
            raise CacheConnectionError(f"{endpoint} knows no server that owns slots", BACKEND)
        return owners

    def _apply(self, owners: dict[int, Endpoint]) -> None:
        if changed := self.map.replace(owners):
            self._changed(changed)
        endpoints = set(self.map.endpoints())
        for endpoint in [endpoint for endpoint, node in self._nodes.items() if endpoint not in endpoints and node.idle]:
            closing = asyncio.create_task(self._close_node(self._nodes.pop(endpoint)))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _close_node(self, node: ClusterNode) -> None:
        with contextlib.suppress(CacheError):
            await node.close()
