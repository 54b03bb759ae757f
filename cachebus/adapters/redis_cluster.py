"""The Redis store over a Redis Cluster: each command goes to the server that has its slot, and follows it when it moves."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import hiredis

from cachebus.actors.ports import SYSTEM_CLOCK, Capabilities, Clock, Gauges, Replied
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
from .redis_cluster_walk import ClusterWalks
from .redis_commands import Command
from .redis_dial import Dial, Identity, Place, TlsFiles
from .redis_errors import BACKEND, code_of, moving
from .redis_node import ClusterNode, Trip, UnderWay
from .redis_plan import Plan
from .redis_slots import SLOTS, SlotTraffic, read_redirection, slot_of
from .redis_tags import TagSpace
from .redis_topology import Topology
from .redis_values import VALUE_MAX

__all__ = ["RedisClusterStore"]

MOST_HOPS = 8
"""How often a command follows its slot before it is given up: servers that disagree send it round in circles."""


class RedisClusterStore:
    """A `PipelinedStore` in a Redis Cluster, version 6.2 or newer, on asyncio.

    `places` are servers that may be asked for the others; the rest is as in `RedisStore`, for each server. A batch is
    answered when every server has answered its part. Requests about one key take effect in the order in which they were
    submitted, also while its slot moves; there is no order between keys of different slots.
    """

    name = BACKEND
    capabilities = Capabilities(
        patterns=True, tags=True, compare_and_set=True, counters=True, leases=True, max_value_bytes=VALUE_MAX
    )
    max_batch = 64
    apart: frozenset[type[Request[Any]]] = frozenset({Clear, DeletePattern, Scan})

    def __init__(
        self,
        places: Sequence[Place],
        *,
        namespace: str,
        identity: Identity | None = None,
        tls: TlsFiles | None = None,
        default_ttl: float | None = None,
        window: int = 8,
        max_connections: int = 2,
        connect_timeout: float = 1.0,
        health_check_interval: float | None = 2.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        if not namespace or ":" in namespace or "{}" in namespace:
            # With an empty pair of braces in front the counters of its tags would not be in one slot.
            raise CacheConfigurationError(
                f"redis: a namespace is not empty and has no colon or {{}}, unlike {namespace!r}"
            )
        self._seeds = tuple(places)
        self._tls = tls
        self._prefix = f"{namespace}:"
        self._default_ttl = default_ttl
        self._space = TagSpace(namespace, here=False)
        self._dial = Dial(
            clock=clock,
            identity=identity or Identity(),
            timeout=connect_timeout,
            silence=health_check_interval,
            window=window,
            counters_here=False,
        )
        self._max_connections = max_connections
        self._traffic = SlotTraffic()
        self._topology: Topology | None = None
        self._walks: ClusterWalks | None = None
        # Slots that are being moved, of which each command takes one key only: one about keys at two servers is refused.
        self._moving: set[int] = set()

    def __repr__(self) -> str:
        return f"<RedisClusterStore {self._prefix!r} at {', '.join(map(str, self._seeds))}>"

    async def open(self) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise CacheConfigurationError("redis needs an asyncio event loop, and this is another's") from None
        if self._tls is not None:
            context = await asyncio.to_thread(self._tls.context, BACKEND)
            self._dial = dataclasses.replace(self._dial, tls=context)
        self._topology = Topology(
            self._dial, self._seeds, self._max_connections, self._arrived, self._failed, self._changed_hands
        )
        self._walks = ClusterWalks(self._topology, self._prefix, self.execute)
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
            await self._walks.finish()
            while not self._traffic.idle:
                await self._traffic.change()
            await self._topology.close()
        finally:
            self._walks.cancel()
            self._topology.drop()

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        future: asyncio.Future[Sequence[Reply]] = asyncio.get_running_loop().create_future()

        def replied(replies: Sequence[Reply]) -> None:
            if not future.done():
                future.set_result(replies)

        await self.submit(batch, replied)
        return await future

    async def submit(self, batch: Sequence[Request[Any]], replied: Replied) -> None:
        if self._topology is None or self._walks is None:
            raise CacheConnectionError("the store is not open", BACKEND)
        if not self.apart.isdisjoint(map(type, batch)):
            self._walks.start(batch, self.apart, replied)
            return
        stamps = await self._stamps(self._topology, batch) if wants_stamps(batch, self._space) else None
        trips = self._trips(batch, replied, stamps)
        unreachable = await self._room(self._topology, {trip.slot for trip in trips})
        # Nothing waits from here on, so that the room is still there, and what is sent first is sent first.
        self._send(self._topology, trips, unreachable)

    def submit_at_once(self, batch: Sequence[Request[Any]], replied: Replied) -> bool:
        topology = self._topology
        if topology is None or not self._traffic.idle or not self.apart.isdisjoint(map(type, batch)):
            return False
        if wants_stamps(batch, self._space):
            return False
        trips = self._trips(batch, replied)
        for trip in trips:
            node = topology.node_of(trip.slot)
            if node is None or node.is_down or not node.has_room:
                return False
        self._send(topology, trips, {})
        return True

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
        replied: Replied,
        stamps: Mapping[int, bytes | CacheError] | None = None,
    ) -> list[Trip]:
        plan, packed = self._planned(batch, stamps)
        if not plan.commands:
            replied(plan.done())
        under_way = UnderWay(len(plan.commands), lambda: replied(plan.done()))
        return [
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
                plan = Plan(batch, self._prefix, self._default_ttl, self._space, group, stamps=stamps, careful=careful)
                if look is not None:
                    plan.commands.append(look)
                return plan, [command.packed() for command in plan.commands]
        raise AssertionError("a careful plan has only keys that can be encoded")

    def _group(self, numbers: dict[str, int], name: str) -> int:
        slot = slot_of(name)
        return SLOTS + numbers.setdefault(name, len(numbers)) if slot in self._moving else slot

    async def _room(self, topology: Topology, slots: set[int]) -> dict[Place, CacheError]:
        """Wait until every server that has one of the slots can take a batch; says which cannot be reached, and why."""
        unreachable: dict[Place, CacheError] = {}
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

    def _send(self, topology: Topology, trips: Sequence[Trip], unreachable: dict[Place, CacheError]) -> None:
        parts: dict[ClusterNode, list[Trip]] = {}
        hopeless: list[tuple[Trip, CacheError]] = []
        for trip in trips:
            self._traffic.begin(trip.slot, trip)
            try:
                node = topology.node(topology.map.place(trip.slot))
                if node.place in unreachable:
                    raise unreachable[node.place]
            except CacheError as error:
                hopeless.append((trip, error))
                topology.learn_soon()
                continue
            parts.setdefault(node, []).append(trip)
        for node, part in parts.items():
            node.send(part)
        for trip, reason in hopeless:
            self._fail(trip, reason)

    # Coming back

    def _arrived(self, node: ClusterNode, trip: Trip, reply: Any, now: float) -> None:
        if type(reply) is hiredis.ReplyError and self._sent_again(node, trip, reply):
            return
        following = trip.command.take(reply, now)
        if following:
            self._send_on(trip, following)
        else:
            self._end(trip)

    def _failed(self, node: ClusterNode, trips: Sequence[Trip], error: CacheError, sent: bool) -> None:
        for trip in trips:
            if sent:
                trip.command.give_up(error)
                self._end(trip)
            else:
                self._fail(trip, error)
        if self._topology is not None:
            self._topology.learn_soon()

    def _sent_again(self, node: ClusterNode, trip: Trip, reply: hiredis.ReplyError) -> bool:
        """Whether a command that was refused has gone out once more, or was failed."""
        assert self._topology is not None
        code = code_of(reply)
        command = trip.command
        if code == "NOSCRIPT" and command.script is not None and not trip.whole:
            # Somebody has emptied the script cache, so it did nothing: sent whole it runs.
            trip.whole, trip.packed = True, command.packed(whole=True)
            self._traffic.hold(trip.slot)
            node.send([trip])
            return True
        if code == "CLUSTERDOWN":
            self._topology.learn_soon()
        if code not in ("MOVED", "ASK", "TRYAGAIN"):
            return False
        trip.hops += 1
        if trip.hops > MOST_HOPS:
            self._fail(trip, moving("again and again"))
        elif code == "MOVED":
            slot, place = read_redirection(str(reply), node.place)
            if self._topology.map.move(slot, place):
                self._changed_hands([slot])
                self._topology.learn_soon()
            trip.asking = False
            self._topology.node(place).send([trip])
        elif command.parts is not None and len(parts := command.parts()) > 1:
            self._take_apart(trip, parts)
        elif code == "ASK":
            _, place = read_redirection(str(reply), node.place)
            self._moving.add(trip.slot)
            trip.asking = True
            self._topology.node(place).send([trip])
        else:
            return False
        return True

    def _take_apart(self, trip: Trip, commands: Sequence[Command]) -> None:
        """Send a command about several keys, of which only some have moved, once more as one for each key.

        They go to the slot's owner, which says of each where it is. What was sent after them has then been done
        already, so that this keeps the order only if nothing was.
        """
        assert self._topology is not None
        self._moving.add(trip.slot)
        if not self._traffic.is_newest(trip.slot, trip):
            self._fail(trip, moving())
            return
        parts = [
            Trip(command, trip.slot, command.packed(), trip.batch.one_more(), trip.follows) for command in commands
        ]
        if trip.follows is not None:
            trip.follows.followed_by += len(parts)
        for part in parts:
            part.hops = trip.hops
            self._traffic.begin(trip.slot, part)
        self._traffic.hold(trip.slot)
        self._end(trip)
        self._send_parts(self._topology, parts)

    def _send_parts(self, topology: Topology, parts: Sequence[Trip]) -> None:
        node = topology.node_of(parts[0].slot)
        if node is not None:
            node.send(parts)
            return
        for part in parts:
            self._fail(part, moving())

    def _send_on(self, trip: Trip, commands: Sequence[Command]) -> None:
        """Send what the answer of a trip still needs. The trip ends with the last of it.

        What writes after all must not come after what was sent behind it about its key.
        """
        assert self._topology is not None
        first = trip.first
        trips = [
            Trip(command, slot_of(command.key), command.packed(), trip.batch.one_more(), trip) for command in commands
        ]
        trip.followed_by = len(trips)
        for each in trips:
            if each.command.ordered:
                self._traffic.hold(first.slot)
            if each.command.ordered and each.slot == first.slot and self._is_overtaken(first):
                self._traffic.begin(each.slot, each)
                self._fail(each, moving("its tags had to be looked up"))
            else:
                self._send(self._topology, [each], {})

    def _is_overtaken(self, trip: Trip) -> bool:
        later: Any = self._traffic.later(trip.slot, trip)
        return later is None or any(trip.command.key in each.command.words for each in later if each.first is not trip)

    def _changed_hands(self, slots: Sequence[int]) -> None:
        """Note that slots have another owner: what is sent from now on must not be there before what follows them."""
        for slot in slots:
            self._moving.discard(slot)
            self._traffic.hold(slot)

    def _fail(self, trip: Trip, error: CacheError) -> None:
        trip.command.fail(error)
        self._end(trip)

    def _end(self, trip: Trip) -> None:
        self._traffic.end(trip.slot)
        trip.batch.one_done()
        if (before := trip.follows) is not None:
            before.followed_by -= 1
            if not before.followed_by:
                self._end(before)
