"""Batches on a connection: what was sent, and what becomes of the replies.

Each reply is read alone: what cannot be read is an error of its own request, and neither the batch nor the connection is
the worse for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import hiredis
from msgspec import Struct

from cachebus.actors.ports import OnReplies
from cachebus.messages import (
    CacheConnectionError,
    CacheError,
    GetOrLease,
    ReleaseLease,
    RenewLease,
    Reply,
    Request,
    Set,
    Stored,
)

from .redis_commands import UNREADABLE, Command, changes, sendable_again, unreadable
from .redis_connection import Argument, RedisConnection
from .redis_errors import BACKEND, STALE_ROLE, code_of
from .redis_leases import Parsed, commit_call, lease_call
from .redis_plan import COMMAND_BYTES, Plan
from .redis_reads import Gets
from .redis_script import Script
from .redis_singles import milliseconds
from .redis_tags import NO_STAMP, TagSpace
from .redis_values import HasTags, encode, read_run


class SentGets(Struct, eq=False):
    """A run of `Get`s that was sent as one `MGET`: the commonest batch, in a third of the time that a plan takes.

    `names` are the keys in Redis, each once; `places` says which of them each request wants, where that are not all of
    them in order.
    """

    connection: RedisConnection
    names: Sequence[str]
    places: list[int] | None
    space: TagSpace
    on_replies: OnReplies
    wanted: int = 1

    def changes(self) -> Iterable[Any]:
        """Nothing: it reads."""
        return ()

    def answer(self, replies: Sequence[Any] | CacheError) -> None:
        """Take the one reply; or why there is none."""
        connection = self.connection
        values: Any = None if isinstance(replies, CacheError) else replies[0]
        kind: object = values.__class__
        if kind is list:
            if self.places is not None:
                values = [values[place] for place in self.places]
            try:
                found = read_run(values, connection.heard_at + connection.offset)
            except (HasTags, *UNREADABLE):
                pass
            else:
                self.on_replies(found)
                return
        # An error, or entries whose tags have to be looked up.
        keys = {name: place for place, name in enumerate(self.names)}
        places = list(range(len(keys))) if self.places is None else self.places
        made: list[Any] = [None] * len(places)
        command = Gets(made, 0, keys, places, self.space, checked=False).command()
        SentCommands([command], self.connection, lambda: made, self.on_replies).answer(replies)


class SentSets(Struct, eq=False):
    """A run of plain `Set`s of bytes that was sent as one call of the script that writes. `plan` makes the same as commands,
    for what is not the commonest answer."""

    connection: RedisConnection
    names: Sequence[str]
    plan: Callable[[], Plan]
    on_replies: OnReplies
    wanted: int = 1

    def changes(self) -> Iterable[Any]:
        """The keys that are written."""
        return self.names

    def answer(self, replies: Sequence[Any] | CacheError) -> None:
        """Take the one reply; or why there is none."""
        versions: Any = None if isinstance(replies, CacheError) else replies[0]
        kind: object = versions.__class__
        if kind is list and len(versions) == len(self.names):
            self.on_replies([Stored(float(version)) for version in versions])
            return
        plan = self.plan()
        SentCommands(plan.commands, self.connection, plan.done, self.on_replies).answer(replies)


def plain_sets(batch: Sequence[Request[Any]], prefix: str, default_px: str) -> tuple[list[str], list[Argument]] | None:
    """The keys of a batch and the arguments of the script that writes, if it is a run of `Set`s of bytes without tags,
    conditions or leases; else `None`."""
    names: list[str] = []
    arguments: list[Argument] = []
    size = 0
    for request in batch:
        if (
            type(request) is not Set
            or type(value := request.value) is not bytes
            or request.tags
            or request.only_if is not None
            or request.lease is not None
        ):
            return None
        ttl = request.ttl
        size += len(value)
        names.append(prefix + request.key)
        arguments += (b"B" + value, default_px if ttl == "default" else milliseconds(ttl), "")
    return (names, arguments) if size < COMMAND_BYTES else None


class SentOne(Struct, eq=False):
    """A request about a lease that was sent alone, as one call of a script. `plan` as in `SentSets`."""

    connection: RedisConnection
    keys: Sequence[Argument]
    make: Parsed
    plan: Callable[[], Plan]
    on_replies: OnReplies
    wanted: int = 1

    def changes(self) -> Iterable[Any]:
        """The keys that may be written."""
        return self.keys

    def answer(self, replies: Sequence[Any] | CacheError) -> None:
        """Take the one reply; or why there is none."""
        connection = self.connection
        if not isinstance(replies, CacheError) and type(replies[0]) is not hiredis.ReplyError:
            try:
                reply = self.make(replies[0], connection.heard_at + connection.offset)
            except UNREADABLE as error:
                reply = unreadable(error)
            self.on_replies([reply])
            return
        plan = self.plan()
        SentCommands(plan.commands, connection, plan.done, self.on_replies).answer(replies)


def lease_command(
    request: Request[Any], prefix: str, default_px: str, space: TagSpace
) -> tuple[list[Argument], Script, Parsed] | None:
    """The words after the script's name, the script, and how its reply is read, of a request about a lease; else `None`. Raises
    `CacheError`."""
    kind = type(request)
    if kind is GetOrLease or kind is ReleaseLease or kind is RenewLease:
        lease: Any = request
        stamp = space.new_stamp(lease.tags) if kind is GetOrLease else NO_STAMP
        return lease_call(lease, prefix + lease.key, stamp, None)
    if type(request) is Set and request.lease is not None and type(request.value) is bytes:
        px = default_px if request.ttl == "default" else milliseconds(request.ttl)
        stamp = space.new_stamp(request.tags) if request.tags else NO_STAMP
        return commit_call(request, prefix + request.key, encode(request.value), px, stamp, True)
    return None


class SentCommands:
    """The commands of a plan. When they are answered, `on_replies` gets what `done` says."""

    __slots__ = ("_commands", "_connection", "_done", "_on_replies", "wanted")

    def __init__(
        self,
        commands: Sequence[Command],
        connection: RedisConnection,
        done: Callable[[], Sequence[Reply]],
        on_replies: OnReplies,
    ) -> None:
        self.wanted = len(commands)
        self._commands = commands
        self._connection = connection
        self._done = done
        self._on_replies = on_replies

    def changes(self) -> Iterable[Any]:
        """The keys that the commands may change."""
        return changes(self._commands)

    def answer(self, replies: Sequence[Any] | CacheError) -> None:
        """Take the replies of the commands. Some may have to be sent once more, or to be followed by others."""
        commands, connection = self._commands, self._connection
        if isinstance(replies, CacheError):
            for command in commands:
                command.give_up(replies)
            self._on_replies(self._done())
            return
        now = connection.now()
        unknown: list[Command] = []
        more: list[Command] = []
        is_stale = False
        for command, reply in zip(commands, replies, strict=True):
            if type(reply) is hiredis.ReplyError:
                code = code_of(reply)
                if code == "NOSCRIPT" and command.script is not None:
                    unknown.append(command)
                    continue
                is_stale = is_stale or code in STALE_ROLE
            more += command.take(reply, now)
        if is_stale:
            connection.drop(CacheConnectionError(f"{connection.server} has become a replica", BACKEND))
        # The script cache was emptied, so the unknown did nothing: sent whole they run, and the server knows them again. What
        # follows from an answer only reads.
        again = sendable_again(commands, unknown, connection.changes_in_flight) if unknown else ()
        if not again and not more:
            self._on_replies(self._done())
            return
        data = [*(each.packed(whole=True) for each in again), *(each.packed() for each in more)]
        self._commands = [*again, *more]
        self.wanted = len(data)
        connection.send(b"".join(data), self)
