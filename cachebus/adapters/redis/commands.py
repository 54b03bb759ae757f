"""Redis commands and the handling of their replies, for one server and for a cluster.

A reply that cannot be read fails its own request only. The rest of the batch and the connection are not affected.
"""

from __future__ import annotations

import struct
from binascii import crc_hqx
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, TypeAlias, cast

import hiredis
from msgspec import Struct

from cachebus.actors.ports import OnReplies
from cachebus.messages import CacheConnectionError, CacheError, CacheSerializationError, Failed, Reply

from .connection import Argument, RedisConnection, pack_words
from .errors import BACKEND, STALE_ROLE, code_of, overtaken, translate
from .scripts import INCREMENT, PEEK, READ, TOUCH, Script
from .write_script import WRITE

Settle = Callable[[Any, float], "Sequence[Command] | None"]
"""Callback for a reply and the server's Unix time in seconds. Returns follow-up commands, if any."""

Fail = Callable[[CacheError], None]

ScriptCall: TypeAlias = tuple[list[Argument], str, Callable[[Any, float], Reply], Script]
"""The arguments of a script, the key that determines its slot, the function that reads the reply, and the script."""

ORDER_SENSITIVE = frozenset(script for twin in (WRITE, TOUCH, INCREMENT) for script in (twin.here, twin.elsewhere))
"""Scripts that must not run after later commands. The others only read, or detect by themselves that they are late."""

_READS = frozenset({"MGET", "GETRANGE", "SCAN"})
_READING = frozenset({READ, PEEK.here, PEEK.elsewhere})

SLOTS = 16384
"""Number of slots. The slot of a key is the CRC16 (XMODEM) of the key or of its hash tag (Redis Cluster Specification,
"Key distribution model")."""

UNREADABLE = (CacheError, ValueError, TypeError, LookupError, AttributeError, OverflowError, struct.error)
"""Exceptions raised while reading a foreign or damaged reply. They fail its own request only."""


def slot_of(name: str) -> int:
    """Return the slot of a Redis key. Raises `UnicodeEncodeError` if the name is not valid Unicode."""
    key = name.encode()
    opened = key.find(b"{")
    if opened >= 0:
        closed = key.find(b"}", opened + 1)
        if closed > opened + 1:
            key = key[opened + 1 : closed]
    return crc_hqx(key, 0) % SLOTS


def tag_of(slot: int) -> bytes:
    """Return two bytes that, used as a hash tag, put a key into the slot."""
    for top in range(4):  # A slot is 14 of the 16 bits, so four pairs match. Any without a brace works.
        crc = slot | top << 14
        # Invert the checksum: its low byte identifies the last table step.
        last = _STEPS[crc & 0xFF]
        first = _STEPS[crc >> 8 ^ _step(last) >> 8]
        tag = bytes((first, last ^ _step(first) >> 8))
        if b"}" not in tag:
            return tag
    raise AssertionError("all four pairs have a brace")


def _step(byte: int) -> int:
    return crc_hqx(bytes((byte,)), 0)


_STEPS = {_step(byte) & 0xFF: byte for byte in range(256)}


def failing(replies: list[Any], at: int) -> Fail:
    """Return a function that stores an error as the reply at a position."""

    def fail(error: CacheError) -> None:
        replies[at] = Failed.of(error)

    return fail


class Command(Struct, eq=False):
    """A Redis command: its words, the key that determines its slot, and the callbacks for its reply.

    `writes` is false if the command is idempotent. `parts` splits a command with several keys into one for each key; it
    may be `None` for a single key. An `ordered` command must run before the commands sent after the one it follows.
    """

    words: list[Argument]
    key: str
    settle: Settle
    fail: Fail
    script: Script | None = None
    writes: bool = False
    parts: Callable[[], list[Command]] | None = None
    ordered: bool = False

    @property
    def changes(self) -> Sequence[Any]:
        """Keys that the command may change."""
        if self.script is not None:
            return () if self.script in _READING else self.words[1 : 1 + cast("int", self.words[0])]
        return () if self.words[0] in _READS else self.words[1:]

    def packed(self, *, whole: bool = False) -> bytes:
        """Encode the command. `whole` sends the text of a script instead of its hash."""
        if self.script is None:
            return pack_words(tuple(self.words))
        name = ("EVAL", self.script.text) if whole else ("EVALSHA", self.script.sha)
        return pack_words((*name, *self.words))

    def take(self, reply: Any, now: float) -> Sequence[Command]:
        """Process the reply, and return follow-up commands. `now` is the server's Unix time in seconds."""
        if isinstance(reply, hiredis.ReplyError):
            self.fail(translate(reply))
            return ()
        try:
            return self.settle(reply, now) or ()
        except CacheError as error:
            self.fail(error)
        except UNREADABLE as error:
            kind = type(error).__name__
            self.fail(CacheSerializationError(f"the server's reply could not be read ({kind})"))
        return ()

    def give_up(self, error: CacheError) -> None:
        """Fail the command because the connection was lost after it was sent."""
        detail = f"{error.detail}; whether the request was done is not known"
        self.fail(CacheConnectionError(detail, BACKEND) if self.writes else error)


class SentCommands(Struct, eq=False):
    """Commands of a plan, sent on a connection. When all are answered, `on_replies` gets the result of `done`."""

    commands: Sequence[Command]
    connection: RedisConnection
    done: Callable[[], Sequence[Reply]]
    on_replies: OnReplies

    @property
    def wanted(self) -> int:
        return len(self.commands)

    def changes(self) -> Iterable[Any]:
        return chain.from_iterable(command.changes for command in self.commands)

    def answer(self, replies: Sequence[Any] | CacheError) -> None:
        """Process the replies of the commands. Resend rejected scripts and send follow-up commands, if any."""
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
        # The script cache was emptied, so unknown scripts had no effect. Sending their text runs them and caches them
        # again. Follow-up commands only read.
        behind = chain.from_iterable(batch.changes() for batch in connection.in_flight)
        again = _sendable_again(commands, unknown, behind) if unknown else ()
        if not again and not more:
            self.on_replies(self.done())
            return
        data = [*(each.packed(whole=True) for each in again), *(each.packed() for each in more)]
        self.commands = [*again, *more]
        connection.send(b"".join(data), self)


def _sendable_again(
    commands: Sequence[Command], unknown: Iterable[Command], behind: Iterable[Any]
) -> Sequence[Command]:
    """Return the `unknown` commands of a batch that may be resent, and fail the others.

    `behind` are the keys that later batches may change. The server runs those batches, and the rest of this one, before
    a resent command. A resent write could overwrite a newer value or restore a deleted one.
    """
    changed, unknown = set(behind), set(unknown)
    again: list[Command] = []
    for command in reversed(commands):
        if command not in unknown:
            changed.update(command.changes)
        elif command.script not in ORDER_SENSITIVE or changed.isdisjoint(command.changes):
            again.append(command)  # Lease scripts check that the lease is still held.
        elif command.parts is None:
            command.fail(overtaken())
        else:
            again += reversed(_sendable_again(parts := command.parts(), parts, changed))
    again.reverse()
    return again


class Countdown:
    """Commands of a batch in a cluster. Calls `done` when each has its answer."""

    def __init__(self, commands: Sequence[Command], done: Callable[[], object]) -> None:
        self.routed_commands: list[RoutedCommand] = []
        self._left = 0
        self._done = done
        for command in commands:
            self.add(command)

    @property
    def last_progress(self) -> float:
        """Monotonic time of the last progress on the slowest connection that still owes an answer."""
        carriers = {each.connection for each in self.routed_commands if each.connection is not None}
        return min((each.last_progress for each in carriers), default=float("-inf"))

    def add(self, command: Command, *, follows: RoutedCommand | None = None, hops: int = 0) -> RoutedCommand:
        """Add a command to the batch."""
        routed = RoutedCommand(command, slot_of(command.key), command.packed(), self, follows, hops)
        self.routed_commands.append(routed)
        self._left += 1
        return routed

    def one_done(self) -> None:
        """Count an answered command. The last one completes the batch."""
        self._left -= 1
        if not self._left:
            self.routed_commands = []  # Break the reference cycle.
            self._done()


class RoutedCommand(Struct, eq=False):
    """Command sent through a cluster. `connection` is set while its answer is pending.

    `asking` is true if the command follows an `ASK` redirection, `whole` if it carries the text of its script.
    `follows` is the command that needs this one for its answer, and `followed_by` is the number of such commands still
    pending.
    """

    command: Command
    slot: int
    packed: bytes
    batch: Countdown
    follows: RoutedCommand | None = None
    hops: int = 0
    asking: bool = False
    whole: bool = False
    followed_by: int = 0
    connection: RedisConnection | None = None

    @property
    def first(self) -> RoutedCommand:
        """First command of the chain of `follows`."""
        return self if self.follows is None else self.follows.first
