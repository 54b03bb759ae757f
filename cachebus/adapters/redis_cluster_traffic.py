"""How commands go to the servers of a Redis Cluster, and what becomes of their answers: a slot may move, a script be unknown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hiredis

from cachebus.messages import CacheError

from .redis_commands import Command
from .redis_connect import Endpoint
from .redis_errors import code_of, moving, overtaken
from .redis_node import ClusterNode, Trip
from .redis_scripts import LATE_IS_WRONG
from .redis_slots import SlotTraffic, read_redirection, slot_of
from .redis_topology import Topology

MOST_HOPS = 8
"""How often a command follows its slot before it is given up: servers that disagree send it round in circles."""


class ClusterTraffic:
    """The part of a `RedisClusterStore` that sends trips and takes in what comes back."""

    def __init__(self) -> None:
        self._traffic = SlotTraffic()
        self._topology: Topology | None = None
        # Slots that are being moved, of which each command takes one key only: one about keys at two servers is refused.
        self._moving: set[int] = set()

    def _send(self, topology: Topology, trips: Sequence[Trip], unreachable: dict[Endpoint, CacheError]) -> None:
        parts: dict[ClusterNode, list[Trip]] = {}
        hopeless: list[tuple[Trip, CacheError]] = []
        for trip in trips:
            self._traffic.begin(trip.slot, trip, changes=bool(trip.command.changes))
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
            # Somebody has emptied the script cache, so it did nothing: sent whole it runs, unless what came after it has
            # been done already.
            if command.script in LATE_IS_WRONG and not self._traffic.is_newest_change(trip.slot, trip):
                self._fail(trip, overtaken())
                return True
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
