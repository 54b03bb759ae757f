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

from .redis_commands import UNREADABLE, Command, changes, sendable_again
from .redis_connection import Argument, RedisConnection
from .redis_counters import Counters
from .redis_errors import BACKEND, STALE_ROLE, code_of
from .redis_leases import Parsed, commit_call, lease_call
from .redis_plan import COMMAND_BYTES, Plan
from .redis_reads import Reads
from .redis_script import Script
from .redis_scripts import WRITE
from .redis_tags import NO_STAMP, TagSpace
from .redis_values import HasTags, encode, milliseconds, read_run


class SentGets(Struct, eq=False):
    """A run of `Get`s that was sent as one command: the commonest batch, in a third of the time that a plan takes.

    `names` are the keys in Redis, each once; `places` says which of them each request wants, where that are not all of
    them in order; `prefix` is the length of what stands before the keys. `checked` as in `Reads`.
    """

    connection: RedisConnection
    names: Sequence[str]
    places: list[int] | None
    prefix: int
    space: TagSpace
    checked: bool
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
        # An error, or entries with tags.
        places = range(len(self.names)) if self.places is None else self.places
        made: list[Any] = [None] * len(places)
        reads = Reads(made, self.prefix, self.space, Counters(self.space), checked=self.checked)
        for name in self.names:
            reads.keys[name] = len(reads.keys)
        for position, place in enumerate(places):
            reads.want(position, self.names[place])
        SentCommands([reads.command()], connection, lambda: made, self.on_replies).answer(replies)


class SentScript(Struct, eq=False):
    """Requests that were sent as one call of a script: a run of plain `Set`s, or one request about a lease. `make` reads the
    answer, as in `ScriptCall`; for errors and the like `plan` makes the same as commands."""

    connection: RedisConnection
    keys: Sequence[Argument]
    make: Parsed | None
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
                if self.make is None:
                    made: Sequence[Reply] = [
                        Stored(float(version)) for _, version in zip(self.keys, replies[0], strict=True)
                    ]
                else:
                    made = [self.make(replies[0], connection.heard_at + connection.offset)]
            except UNREADABLE:
                pass  # The plan says which requests that concerns.
            else:
                self.on_replies(made)
                return
        plan = self.plan()
        SentCommands(plan.commands, connection, plan.done, self.on_replies).answer(replies)


ScriptCall = tuple[list[Argument], Script, Parsed | None]
"""The words after the script's name, the script, and what reads its reply; `None` where that is the versions of values."""


def script_call(batch: Sequence[Request[Any]], prefix: str, default_px: str, space: TagSpace) -> ScriptCall | None:
    """A batch as one call of a script, if it is a run of plain `Set`s or one request about a lease. Raises `CacheError`."""
    request: Any = batch[0]
    kind: object = request.__class__
    if kind is GetOrLease or kind is ReleaseLease or kind is RenewLease:
        if len(batch) > 1:
            return None
        stamp = space.new_stamp(request.tags) if kind is GetOrLease else NO_STAMP
        return lease_call(request, prefix + request.key, stamp, None)
    if kind is not Set:
        return None
    if request.lease is not None:
        if len(batch) > 1 or type(request.value) is not bytes:
            return None
        px = default_px if request.ttl == "default" else milliseconds(request.ttl)
        stamp = space.new_stamp(request.tags) if request.tags else NO_STAMP
        return commit_call(request, prefix + request.key, encode(request.value), px, stamp, True)
    names: list[Argument] = []
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
    return ([len(names), *names, *arguments], WRITE.here, None) if size < COMMAND_BYTES else None


class SentCommands(Struct, eq=False):
    """The commands of a plan. When they are answered, `on_replies` gets what `done` says."""

    commands: Sequence[Command]
    connection: RedisConnection
    done: Callable[[], Sequence[Reply]]
    on_replies: OnReplies

    @property
    def wanted(self) -> int:
        """How many replies it takes."""
        return len(self.commands)

    def changes(self) -> Iterable[Any]:
        """The keys that the commands may change."""
        return changes(self.commands)

    def answer(self, replies: Sequence[Any] | CacheError) -> None:
        """Take the replies of the commands. Some may have to be sent once more, or to be followed by others."""
        commands, connection = self.commands, self.connection
        if isinstance(replies, CacheError):
            for command in commands:
                command.give_up(replies)
            self.on_replies(self.done())
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
            self.on_replies(self.done())
            return
        data = [*(each.packed(whole=True) for each in again), *(each.packed() for each in more)]
        self.commands = [*again, *more]
        connection.send(b"".join(data), self)
