"""Routing of commands to the servers of a Redis Cluster, with redirections and unknown scripts."""

from __future__ import annotations

import contextlib
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import hiredis

from cachebus.messages import CacheError

from ..commands import ORDER_SENSITIVE, SLOTS, Command, RoutedCommand, slot_of
from ..connect import Connector, Endpoint, RedisPool
from ..connection import Change
from ..errors import code_of, moving, overtaken
from .topology import ClusterNode, Topology, read_redirection

MAX_HOPS = 8
"""Maximum number of redirections of a command. Servers that disagree could redirect it endlessly."""


REMEMBERED = 64  # Number of commands remembered for a slot while it has commands in flight.


class SlotQueues:
    """Commands in flight in each slot. Ensures that no newer command overtakes one that is sent again.

    A redirection *holds* a slot until every command in flight in it has its answer. Otherwise a new command could reach
    the new server before commands that the old server has yet to redirect. `change` waits until a slot becomes idle.
    """

    def __init__(self) -> None:
        self._in_flight: dict[int, int] = {}
        self._sent: defaultdict[int, deque[object]] = defaultdict(partial(deque[object], maxlen=REMEMBERED))
        self._newest_change: dict[int, object] = {}
        self._held: set[int] = set()
        self._change = Change()
        self.change = self._change.wait

    def __repr__(self) -> str:
        return f"<SlotQueues in {len(self._in_flight)} slots, {len(self._held)} held>"

    @property
    def idle(self) -> bool:
        """True if no command is in flight."""
        return not self._in_flight

    def begin(self, slot: int, what: object, *, changes: bool = True) -> None:
        """Record that `what` is sent, and whether it may change a key."""
        self._in_flight[slot] = self._in_flight.get(slot, 0) + 1
        self._sent[slot].append(what)
        if changes:
            self._newest_change[slot] = what

    def end(self, slot: int) -> None:
        """Record that a command in a slot has its answer."""
        left = self._in_flight[slot] - 1
        if left:
            self._in_flight[slot] = left
            return
        del self._in_flight[slot], self._sent[slot]
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
        if slot in self._in_flight:
            self._held.add(slot)

    def is_held(self, slots: Iterable[int]) -> bool:
        """Return `True` if one of the slots is held."""
        return bool(self._held) and not self._held.isdisjoint(slots)


class Router:
    """Router that sends commands to the servers of their slots and handles redirections in their replies."""

    def __init__(self, connector: Connector, seeds: Sequence[Endpoint]) -> None:
        self.topology = Topology(connector, seeds, self._node, self._on_moved_slots)
        self._connector = connector
        self._slot_queues = SlotQueues()
        # Slots being migrated. Their commands have one key each: a server rejects a command whose keys are on two
        # servers.
        self._moving: set[int] = set()

    def _node(self, endpoint: Endpoint) -> ClusterNode:
        pool = RedisPool(partial(self._connector.connect, endpoint), self._connector.max_connections)
        return ClusterNode(endpoint, pool, self._on_reply, self._on_undelivered)

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
            if self._slot_queues.is_held(slots):
                await self._slot_queues.change()
                continue
            nodes = (self.topology.node_of(slot) for slot in slots)
            full = next(
                (each for each in nodes if each and each.endpoint not in unreachable and not each.has_room), None
            )
            if full is None:
                return unreachable
            if full.connect_error is not None:
                unreachable[full.endpoint] = full.connect_error
                full.try_again()
                self.topology.update_soon()
                continue
            try:
                await full.room()
            except CacheError as error:
                unreachable[full.endpoint] = error
                with contextlib.suppress(CacheError):
                    await self.topology.update()  # Another server may have taken over its slots.

    def has_room(self, routed_commands: Sequence[RoutedCommand]) -> bool:
        """Return `True` if the commands can be sent now."""
        if self._slot_queues.is_held(routed.slot for routed in routed_commands):
            return False
        nodes = (self.topology.node_of(routed.slot) for routed in routed_commands)
        return all(node is not None and node.has_room for node in nodes)

    def send(
        self, routed_commands: Sequence[RoutedCommand], unreachable: Mapping[Endpoint, CacheError] | None = None
    ) -> None:
        """Send commands without waiting. Those to `unreachable` servers fail."""
        parts: dict[ClusterNode, list[RoutedCommand]] = {}
        rejected: list[tuple[RoutedCommand, CacheError]] = []
        for routed in routed_commands:
            self._slot_queues.begin(routed.slot, routed, changes=bool(routed.command.changes))
            try:
                node = self.topology.node(self.topology.map.owner(routed.slot))
                if unreachable and node.endpoint in unreachable:
                    raise unreachable[node.endpoint]
            except CacheError as error:
                rejected.append((routed, error))
                self.topology.update_soon()
                continue
            parts.setdefault(node, []).append(routed)
        for node, part in parts.items():
            node.send(part)
        for routed, reason in rejected:
            self._fail(routed, reason)

    async def close(self) -> None:
        """Wait for commands in flight, then close."""
        while not self._slot_queues.idle:
            await self._slot_queues.change()
        await self.topology.close()

    # Replies

    def _on_reply(self, node: ClusterNode, routed: RoutedCommand, reply: Any, now: float) -> None:
        if type(reply) is hiredis.ReplyError and self._resend(node, routed, reply):
            return
        following = routed.command.take(reply, now)
        if following:
            self._send_follow_ups(routed, following)
        else:
            self._end(routed)

    def _on_undelivered(self, routed_commands: Sequence[RoutedCommand], error: CacheError, sent: bool) -> None:
        for routed in routed_commands:
            if sent:
                routed.command.give_up(error)
                self._end(routed)
            else:
                self._fail(routed, error)
        self.topology.update_soon()

    def _resend(self, node: ClusterNode, routed: RoutedCommand, reply: hiredis.ReplyError) -> bool:
        """Resend or fail a rejected command. Return `False` if the reply is an error for the caller."""
        code = code_of(reply)
        command = routed.command
        if code == "NOSCRIPT" and command.script is not None and not routed.whole:
            # The script cache was emptied, so the script had no effect. Send its text, unless a newer change was sent.
            if command.script in ORDER_SENSITIVE and not self._slot_queues.is_newest_change(routed.slot, routed):
                self._fail(routed, overtaken())
                return True
            routed.whole, routed.packed = True, command.packed(whole=True)
            self._slot_queues.hold(routed.slot)
            node.send([routed])
            return True
        if code == "CLUSTERDOWN":
            self.topology.update_soon()
        if code not in ("MOVED", "ASK", "TRYAGAIN"):
            return False
        routed.hops += 1
        if routed.hops > MAX_HOPS:
            self._fail(routed, moving("too many redirections"))
        elif code == "MOVED":
            slot, endpoint = read_redirection(str(reply), node.endpoint)
            if self.topology.map.move(slot, endpoint):
                self._on_moved_slots([slot])
                self.topology.update_soon()
            routed.asking = False
            self.topology.node(endpoint).send([routed])
        elif command.parts is not None and len(parts := command.parts()) > 1:
            self._split(routed, parts)
        elif code == "ASK":
            _, endpoint = read_redirection(str(reply), node.endpoint)
            self._moving.add(routed.slot)
            routed.asking = True
            self.topology.node(endpoint).send([routed])
        else:
            return False
        return True

    def _split(self, routed: RoutedCommand, commands: Sequence[Command]) -> None:
        """Split a command with several keys, some of which have moved, into one for each key, and send these.

        They go to the owner of the slot, which redirects the keys that have moved. This keeps the order only if no
        command was sent after the original one, so otherwise it fails.
        """
        self._moving.add(routed.slot)
        if not self._slot_queues.is_newest(routed.slot, routed):
            self._fail(routed, moving())
            return
        parts = [routed.batch.add(command, follows=routed.follows, hops=routed.hops) for command in commands]
        if routed.follows is not None:
            routed.follows.followed_by += len(parts)
        self.send(parts)
        self._slot_queues.hold(routed.slot)
        self._end(routed)

    def _send_follow_ups(self, routed: RoutedCommand, commands: Sequence[Command]) -> None:
        """Send follow-up commands. The original command ends with the last of them.

        A follow-up that writes must not run after a later command for its key, so it fails in that case.
        """
        first = routed.first
        routed_commands = [routed.batch.add(command, follows=routed) for command in commands]
        routed.followed_by = len(routed_commands)
        for each in routed_commands:
            if each.command.ordered:
                self._slot_queues.hold(first.slot)
            if each.command.ordered and each.slot == first.slot and self._is_overtaken(first):
                self._slot_queues.begin(each.slot, each)
                self._fail(each, moving("its tags had to be checked"))
            else:
                self.send([each])

    def _is_overtaken(self, routed: RoutedCommand) -> bool:
        later: Any = self._slot_queues.later(routed.slot, routed)
        return later is None or any(
            routed.command.key in each.command.words for each in later if each.first is not routed
        )

    def _on_moved_slots(self, slots: Sequence[int]) -> None:
        """Record that slots have a new owner, and hold them until the redirected commands are answered."""
        for slot in slots:
            self._moving.discard(slot)
            self._slot_queues.hold(slot)

    def _fail(self, routed: RoutedCommand, error: CacheError) -> None:
        routed.command.fail(error)
        self._end(routed)

    def _end(self, routed: RoutedCommand) -> None:
        self._slot_queues.end(routed.slot)
        routed.batch.one_done()
        if (before := routed.follows) is not None:
            before.followed_by -= 1
            if not before.followed_by:
                self._end(before)
