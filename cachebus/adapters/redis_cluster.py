"""The Redis store over a Redis Cluster: each command goes to the server that has its slot, and follows it when it moves."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cachebus.actors.ports import NO_PROGRESS, SYSTEM_CLOCK, Clock, Gauges, OnReplies, Progress
from cachebus.messages import (
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    Clear,
    DeletePattern,
    Reply,
    Request,
    Scan,
)

from .redis_cluster_tags import Stamps, looks_for_tags, wants_stamps
from .redis_cluster_traffic import ClusterTraffic
from .redis_cluster_walk import ClusterWalks
from .redis_connect import Connector, Credentials, Endpoint, TlsFiles
from .redis_connection import RedisConnection
from .redis_errors import BACKEND
from .redis_listener import RedisListener
from .redis_node import Trip, UnderWay
from .redis_plan import CAPABILITIES, Plan
from .redis_slots import SLOTS, slot_of
from .redis_tags import TagSpace
from .redis_topology import Topology
from .redis_walk import Walks, submitted
from .redis_watch import LeaseWatch

__all__ = ["RedisClusterStore"]


class RedisClusterStore(ClusterTraffic):
    """A `PipelinedStore` in a Redis Cluster, version 6.2 or newer, on asyncio.

    `places` are servers that may be asked for the others; the rest is as in `RedisStore`, for each server. A batch is
    answered when every server has answered its part. Requests about one key take effect in the order in which they were
    submitted, also while its slot moves; there is no order between keys of different slots.
    """

    name = BACKEND
    capabilities = CAPABILITIES
    max_batch = 64
    long_running: frozenset[type[Request[Any]]] = frozenset({Clear, DeletePattern, Scan})

    def __init__(
        self,
        places: Sequence[Endpoint],
        *,
        namespace: str,
        identity: Credentials | None = None,
        tls: TlsFiles | None = None,
        default_ttl: float | None = None,
        window: int = 8,
        max_connections: int = 2,
        connect_timeout: float = 1.0,
        health_check_interval: float | None = 2.0,
        clock: Clock = SYSTEM_CLOCK,
        planner: Callable[..., Plan] = Plan,
    ) -> None:
        if not namespace or ":" in namespace or "{}" in namespace:
            # With an empty pair of braces in front the counters of its tags would not be in one slot.
            raise CacheConfigurationError(
                f"redis: a namespace is not empty and has no colon or {{}}, unlike {namespace!r}"
            )
        super().__init__()
        self._seeds = tuple(places)
        self._tls = tls
        self._prefix = f"{namespace}:"
        self._default_ttl = default_ttl
        self._space = TagSpace(namespace, here=False)
        self._planner = planner
        self._dial = Connector(
            clock=clock,
            identity=identity or Credentials(),
            timeout=connect_timeout,
            health_interval=health_check_interval,
            window=window,
            counters_here=False,
        )
        self._max_connections = max_connections
        self._walks: Walks | None = None
        self._watch = LeaseWatch(self.listener, namespace)
        self.watch = self._watch.watch

    def __repr__(self) -> str:
        return f"<RedisClusterStore {self._prefix!r} at {', '.join(map(str, self._seeds))}>"

    async def open(self) -> None:
        self._dial = await self._dial.prepared(self._tls)
        self._topology = Topology(
            self._dial, self._seeds, self._max_connections, self._arrived, self._failed, self._changed_hands
        )
        walks = ClusterWalks(self._topology, self._prefix, self.execute)
        self._walks = Walks(self.long_running, walks.walk, self.execute)
        try:
            await self._topology.learn()
        except BaseException:
            self._topology.drop()
            raise

    async def close(self) -> None:
        """Finish what is under way, then close; cancelled, break it off."""
        if self._topology is None or self._walks is None:
            return
        try:
            await self._watch.close()
            await self._walks.finish()
            while not self._traffic.idle:
                await self._traffic.change()
            await self._topology.close()
        finally:
            self._walks.cancel()
            self._topology.drop()

    def listener(self) -> RedisListener:
        """A listener to the cluster's channels, with a connection of its own to any server. Whoever asks for it closes
        it."""
        return RedisListener(self._connect_anywhere, clock=self._dial.clock)

    async def _connect_anywhere(self) -> RedisConnection:
        places = [] if self._topology is None else self._topology.map.places()
        reason: CacheError = CacheConnectionError("no server of the cluster is known", BACKEND)
        for place in dict.fromkeys((*random.sample(places, len(places)), *self._seeds)):
            try:
                return await self._dial.connect(place)
            except CacheError as error:
                reason = error
        raise reason

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        return await submitted(self.submit, batch)

    async def submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        if self._topology is None or self._walks is None:
            raise CacheConnectionError("the store is not open", BACKEND)
        if not self.long_running.isdisjoint(map(type, batch)):
            self._walks.start(batch, on_replies)
            return NO_PROGRESS
        stamps = await self._stamps(self._topology, batch) if wants_stamps(batch, self._space) else None
        under_way, trips = self._trips(batch, on_replies, stamps)
        unreachable = await self._room(self._topology, {trip.slot for trip in trips})
        # Nothing waits from here on, so that the room is still there, and what is sent first is sent first.
        self._send(self._topology, trips, unreachable)
        return under_way

    def try_submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress | None:
        topology = self._topology
        if topology is None or type(batch[0]) in self.long_running or wants_stamps(batch, self._space):
            return None
        under_way, trips = self._trips(batch, on_replies)
        if self._traffic.is_held(trip.slot for trip in trips):
            return None
        for trip in trips:
            node = topology.node_of(trip.slot)
            if node is None or node.is_down or not node.has_room:
                return None
        self._send(topology, trips, {})
        return under_way

    # Going out

    async def _stamps(self, topology: Topology, batch: Sequence[Request[Any]]) -> Mapping[int, bytes | CacheError]:
        """What has to be read of the counters before the batch goes out, by the places of its requests."""
        stamps = Stamps(batch, self._space, self._default_ttl)
        read = asyncio.Event()
        under_way = UnderWay(len(stamps.commands), read.set)
        trips = [Trip(command, slot_of(command.key), command.packed(), under_way) for command in stamps.commands]
        if trips:
            self._send(topology, trips, await self._room(topology, {trip.slot for trip in trips}))
            await read.wait()
        return stamps.by_place

    def _trips(
        self,
        batch: Sequence[Request[Any]],
        on_replies: OnReplies,
        stamps: Mapping[int, bytes | CacheError] | None = None,
    ) -> tuple[UnderWay, list[Trip]]:
        plan, packed = self._planned(batch, stamps)
        under_way = UnderWay(len(plan.commands), lambda: on_replies(plan.done()))
        if not plan.commands:
            on_replies(plan.done())
        return under_way, [
            Trip(command, slot_of(command.key), data, under_way)
            for command, data in zip(plan.commands, packed, strict=True)
        ]

    def _planned(
        self, batch: Sequence[Request[Any]], stamps: Mapping[int, bytes | CacheError] | None
    ) -> tuple[Plan, list[bytes]]:
        look = looks_for_tags(batch, self._space)
        for careful in (False, True):
            # A key of a slot that is being moved is a group of its own, beyond the numbers of the slots.
            numbers: dict[str, int] = {}
            with contextlib.suppress(UnicodeEncodeError):
                group = partial(self._group, numbers)
                plan = self._planner(
                    batch, self._prefix, self._default_ttl, self._space, group, stamps=stamps, careful=careful
                )
                if look is not None:
                    plan.commands.append(look)
                return plan, [command.packed() for command in plan.commands]
        raise AssertionError("a careful plan has only keys that can be encoded")

    def _group(self, numbers: dict[str, int], name: str) -> int:
        slot = slot_of(name)
        return SLOTS + numbers.setdefault(name, len(numbers)) if slot in self._moving else slot

    async def _room(self, topology: Topology, slots: set[int]) -> dict[Endpoint, CacheError]:
        """Wait until every server that has one of the slots can take a batch; says which cannot be reached, and why."""
        unreachable: dict[Endpoint, CacheError] = {}
        while True:
            if self._traffic.is_held(slots):
                await self._traffic.change()
                continue
            full = None
            for slot in slots:
                node = topology.node_of(slot)
                if node is not None and node.place not in unreachable and not node.has_room:
                    full = node
                    break
            if full is None:
                return unreachable
            if full.is_down and full.trouble is not None:
                unreachable[full.place] = full.trouble
                full.try_again()
                topology.learn_soon()
                continue
            try:
                await full.room()
            except CacheError as error:
                unreachable[full.place] = error
                with contextlib.suppress(CacheError):
                    await topology.learn()  # Perhaps another has its slots by now.
