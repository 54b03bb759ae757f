"""Routing of commands to the servers of a Redis Cluster, with redirections and unknown scripts."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import hiredis

from cachebus.messages import CacheError

from ..commands import LATE_IS_WRONG, SLOTS, Command, RoutedCommand, slot_of
from ..connect import Connector, Endpoint, RedisPool
from ..connection import Change
from ..errors import code_of, moving, overtaken
from .topology import ClusterNode, Topology, read_redirection

MOST_HOPS = 8
"""Maximum number of redirections of a command. Servers that disagree could redirect it endlessly."""


REMEMBERED = 64  # Number of commands remembered for a slot while it has commands in flight.


class SlotQueues:
    """Commands in flight in each slot. Ensures that no newer command overtakes one that is sent again.

    A redirection *holds* a slot until every command in flight in it has its answer. Otherwise a new command could reach
    the new server before commands that the old server has yet to redirect. `change` waits until a slot becomes idle.
    """

    def __init__(self) -> None:
        self._under_way: dict[int, int] = {}
        self._sent: defaultdict[int, deque[object]] = defaultdict(partial(deque[object], maxlen=REMEMBERED))
        self._newest_change: dict[int, object] = {}
        self._held: set[int] = set()
        self._change = Change()
        self.change = self._change.wait

    def __repr__(self) -> str:
        return f"<SlotQueues in {len(self._under_way)} slots, {len(self._held)} held>"

    @property
    def idle(self) -> bool:
        """True if no command is in flight."""
        return not self._under_way

    def begin(self, slot: int, what: object, *, changes: bool = True) -> None:
        """Record that `what` is sent, and whether it may change a key."""
        self._under_way[slot] = self._under_way.get(slot, 0) + 1
        self._sent[slot].append(what)
        if changes:
            self._newest_change[slot] = what

    def end(self, slot: int) -> None:
        """Record that a command in a slot has its answer."""
        left = self._under_way[slot] - 1
        if left:
            self._under_way[slot] = left
            return
        del self._under_way[slot], self._sent[slot]
        self._newest_change.pop(slot, None)
        self._held.discard(slot)
        self._change.wake()

    def is_newest(self, slot: int, what: object) -> bool:
        """Return `True` if no command was sent in the slot after `what`."""
        return slot in self._sent and self._sent[slot][-1] is what

    def later(self, slot: int, what: object) -> list[object] | None:
        """Return what was sent in the slot after `what`; `None` if `what` is no longer remembered."""
        sent = list(self._sent.get(slot, ()))
        for at, each in enumerate(sent):
            if each is what:
                return sent[at + 1 :]
        return None

    def is_newest_change(self, slot: int, what: object) -> bool:
        """Return `True` if no command that may change a key was sent in the slot after `what`."""
        return self._newest_change.get(slot) is what

    def hold(self, slot: int) -> None:
        """Hold back new commands until the slot is idle."""
        if slot in self._under_way:
            self._held.add(slot)

    def is_held(self, slots: Iterable[int]) -> bool:
        """Return `True` if one of the slots is held."""
        return bool(self._held) and not self._held.isdisjoint(slots)


class Router:
    """Sends commands to the servers of their slots, and handles the replies. `topology` holds the servers."""

    def __init__(self, connector: Connector, seeds: Sequence[Endpoint]) -> None:
        self.topology = Topology(connector, seeds, self._node, self._changed_hands)
        self._connector = connector
        self._traffic = SlotQueues()
        # Slots being migrated. Their commands have one key each: a server rejects a command whose keys are on two
        # servers.
        self._moving: set[int] = set()

    def _node(self, place: Endpoint) -> ClusterNode:
        pool = RedisPool(partial(self._connector.connect, place), self._connector.max_connections)
        return ClusterNode(place, pool, self._arrived, self._undelivered)

    def group(self, numbers: dict[str, int], name: str) -> int:
        """Return the group of a key: its slot.

        While the slot is being migrated, each key is a separate group, numbered in `numbers` after the slots.
        """
        slot = slot_of(name)
        return SLOTS + numbers.setdefault(name, len(numbers)) if slot in self._moving else slot

    async def room(self, slots: set[int]) -> Mapping[Endpoint, CacheError]:
        """Wait until every server of the slots can accept a batch. Return the unreachable ones with their errors."""
        unreachable: dict[Endpoint, CacheError] = {}
        while True:
            if self._traffic.is_held(slots):
                await self._traffic.change()
                continue
            nodes = (self.topology.node_of(slot) for slot in slots)
            full = next((each for each in nodes if each and each.place not in unreachable and not each.has_room), None)
            if full is None:
                return unreachable
            if full.trouble is not None:
                unreachable[full.place] = full.trouble
                full.try_again()
                self.topology.learn_soon()
                continue
            try:
                await full.room()
            except CacheError as error:
                unreachable[full.place] = error
                with contextlib.suppress(CacheError):
                    await self.topology.learn()  # Another server may have taken over its slots.

    def has_room(self, trips: Sequence[RoutedCommand]) -> bool:
        """Return `True` if the commands can be sent now."""
        if self._traffic.is_held(trip.slot for trip in trips):
            return False
        nodes = (self.topology.node_of(trip.slot) for trip in trips)
        return all(node is not None and node.has_room for node in nodes)

    def send(self, trips: Sequence[RoutedCommand], unreachable: Mapping[Endpoint, CacheError] | None = None) -> None:
        """Send commands without waiting. Those to `unreachable` servers fail."""
        parts: dict[ClusterNode, list[RoutedCommand]] = {}
        hopeless: list[tuple[RoutedCommand, CacheError]] = []
        for trip in trips:
            self._traffic.begin(trip.slot, trip, changes=bool(trip.command.changes))
            try:
                node = self.topology.node(self.topology.map.place(trip.slot))
                if unreachable and node.place in unreachable:
                    raise unreachable[node.place]
            except CacheError as error:
                hopeless.append((trip, error))
                self.topology.learn_soon()
                continue
            parts.setdefault(node, []).append(trip)
        for node, part in parts.items():
            node.send(part)
        for trip, reason in hopeless:
            self._fail(trip, reason)

    async def close(self) -> None:
        """Wait for commands in flight, then close."""
        while not self._traffic.idle:
            await self._traffic.change()
        await self.topology.close()

    # Replies

    def _arrived(self, node: ClusterNode, trip: RoutedCommand, reply: Any, now: float) -> None:
        if type(reply) is hiredis.ReplyError and self._sent_again(node, trip, reply):
            return
        following = trip.command.take(reply, now)
        if following:
            self._send_on(trip, following)
        else:
            self._end(trip)

    def _undelivered(self, trips: Sequence[RoutedCommand], error: CacheError, sent: bool) -> None:
        for trip in trips:
            if sent:
                trip.command.give_up(error)
                self._end(trip)
            else:
                self._fail(trip, error)
        self.topology.learn_soon()

    def _sent_again(self, node: ClusterNode, trip: RoutedCommand, reply: hiredis.ReplyError) -> bool:
        """Resend or fail a rejected command. Return `False` if the reply is an error for the caller."""
        code = code_of(reply)
        command = trip.command
        if code == "NOSCRIPT" and command.script is not None and not trip.whole:
            # The script cache was emptied, so the script had no effect. Send its text, unless a newer change was sent.
            if command.script in LATE_IS_WRONG and not self._traffic.is_newest_change(trip.slot, trip):
                self._fail(trip, overtaken())
                return True
            trip.whole, trip.packed = True, command.packed(whole=True)
            self._traffic.hold(trip.slot)
            node.send([trip])
            return True
        if code == "CLUSTERDOWN":
            self.topology.learn_soon()
        if code not in ("MOVED", "ASK", "TRYAGAIN"):
            return False
        trip.hops += 1
        if trip.hops > MOST_HOPS:
            self._fail(trip, moving("too many redirections"))
        elif code == "MOVED":
            slot, place = read_redirection(str(reply), node.place)
            if self.topology.map.move(slot, place):
                self._changed_hands([slot])
                self.topology.learn_soon()
            trip.asking = False
            self.topology.node(place).send([trip])
        elif command.parts is not None and len(parts := command.parts()) > 1:
            self._take_apart(trip, parts)
        elif code == "ASK":
            _, place = read_redirection(str(reply), node.place)
            self._moving.add(trip.slot)
            trip.asking = True
            self.topology.node(place).send([trip])
        else:
            return False
        return True

    def _take_apart(self, trip: RoutedCommand, commands: Sequence[Command]) -> None:
        """Split a command with several keys, some of which have moved, into one for each key, and send these.

        They go to the owner of the slot, which redirects the keys that have moved. This keeps the order only if no
        command was sent after the original one, so otherwise it fails.
        """
        self._moving.add(trip.slot)
        if not self._traffic.is_newest(trip.slot, trip):
            self._fail(trip, moving())
            return
        parts = [trip.batch.add(command, follows=trip.follows, hops=trip.hops) for command in commands]
        if trip.follows is not None:
            trip.follows.followed_by += len(parts)
        self.send(parts)
        self._traffic.hold(trip.slot)
        self._end(trip)

    def _send_on(self, trip: RoutedCommand, commands: Sequence[Command]) -> None:
        """Send follow-up commands. The original command ends with the last of them.

        A follow-up that writes must not run after a later command for its key, so it fails in that case.
        """
        first = trip.first
        trips = [trip.batch.add(command, follows=trip) for command in commands]
        trip.followed_by = len(trips)
        for each in trips:
            if each.command.ordered:
                self._traffic.hold(first.slot)
            if each.command.ordered and each.slot == first.slot and self._is_overtaken(first):
                self._traffic.begin(each.slot, each)
                self._fail(each, moving("its tags had to be checked"))
            else:
                self.send([each])

    def _is_overtaken(self, trip: RoutedCommand) -> bool:
        later: Any = self._traffic.later(trip.slot, trip)
        return later is None or any(trip.command.key in each.command.words for each in later if each.first is not trip)

    def _changed_hands(self, slots: Sequence[int]) -> None:
        """Record that slots have a new owner, and hold them until the redirected commands are answered."""
        for slot in slots:
            self._moving.discard(slot)
            self._traffic.hold(slot)

    def _fail(self, trip: RoutedCommand, error: CacheError) -> None:
        trip.command.fail(error)
        self._end(trip)

    def _end(self, trip: RoutedCommand) -> None:
        self._traffic.end(trip.slot)
        trip.batch.one_done()
        if (before := trip.follows) is not None:
            before.followed_by -= 1
            if not before.followed_by:
                self._end(before)
