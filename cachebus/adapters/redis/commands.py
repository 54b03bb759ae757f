"""Redis commands under way, to one server or through a cluster: what is sent, and what becomes of the replies.

Each reply is read alone: what cannot be read is an error of its own request, and neither the batch nor the connection is
the worse for it.
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
"""Takes in a reply, and the server's Unix time in seconds. Returns commands that the answer still needs."""

Fail = Callable[[CacheError], None]

ScriptCall: TypeAlias = tuple[list[Argument], str, Callable[[Any, float], Reply], Script]
"""The words after a script's name, the key that says which node it goes to, what reads its reply, and the script."""

LATE_IS_WRONG = frozenset(script for twin in (WRITE, TOUCH, INCREMENT) for script in (twin.here, twin.elsewhere))
"""Those that must not be done after what was sent later. The others only read, or find out themselves that they are late."""

_READS = frozenset({"MGET", "GETRANGE", "SCAN"})
_READING = frozenset({READ, PEEK.here, PEEK.elsewhere})

SLOTS = 16384
"""Keys are assigned to slots by CRC16 (XMODEM), of the key or of its hash tag: Redis Cluster Specification, "Key
distribution model"."""

UNREADABLE = (CacheError, ValueError, TypeError, LookupError, AttributeError, OverflowError, struct.error)
"""What reading a reply raises whose bytes are not ours, or damaged: an error of its own request, and of no other."""


def slot_of(name: str) -> int:
    """The slot of a key as it stands in the server. Raises `UnicodeEncodeError` for what is no valid Unicode."""
    key = name.encode()
    opened = key.find(b"{")
    if opened >= 0:
        closed = key.find(b"}", opened + 1)
        if closed > opened + 1:
            key = key[opened + 1 : closed]
    return crc_hqx(key, 0) % SLOTS


def tag_of(slot: int) -> bytes:
    """Two bytes that, as a hash tag, put a key into a slot."""
    for top in range(4):  # A slot is 14 bits of 16: four pairs have it, and one without a brace will do.
        crc = slot | top << 14
        # Backwards through the checksum: its low byte says which step was the last one.
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
    """A function that makes an error the reply in a place."""

    def fail(error: CacheError) -> None:
        replies[at] = Failed.of(error)

    return fail


class Command(Struct, eq=False):
    """One Redis command: its words, the key that says which node it goes to, and what to do with its reply.

    `writes` is false if doing it twice does what doing it once does. `parts` makes of a command about several keys one for
    each; it may be `None` if there is one key only. An `ordered` command must not be overtaken by what was sent after the
    command that it follows from.
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
        """The keys that it may change."""
        if self.script is not None:
            return () if self.script in _READING else self.words[1 : 1 + cast("int", self.words[0])]
        return () if self.words[0] in _READS else self.words[1:]

    def packed(self, *, whole: bool = False) -> bytes:
        """The command as bytes; `whole` sends a script's text instead of its name."""
        if self.script is None:
            return pack_words(tuple(self.words))
        name = ("EVAL", self.script.text) if whole else ("EVALSHA", self.script.sha)
        return pack_words((*name, *self.words))

    def take(self, reply: Any, now: float) -> Sequence[Command]:
        """Take in the reply, and return what has to be sent on. `now` is the server's Unix time in seconds."""
        if isinstance(reply, hiredis.ReplyError):
            self.fail(translate(reply))
            return ()
        try:
            return self.settle(reply, now) or ()
        except CacheError as error:
            self.fail(error)
        except UNREADABLE as error:
            kind = type(error).__name__
            self.fail(CacheSerializationError(f"the server's reply could not be understood ({kind})"))
        return ()

    def give_up(self, error: CacheError) -> None:
        """Take in that the connection was lost after the command was sent."""
        doubt = f"{error.detail}; whether the request was done is not known"
        self.fail(CacheConnectionError(doubt, BACKEND) if self.writes else error)


class SentCommands(Struct, eq=False):
    """The commands of a plan, sent on a connection. When they are answered, `on_replies` gets what `done` returns."""

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
    """Of a batch, those of the commands `unknown` to the server that may be sent once more; the others are failed.
    `behind` are keys that what was sent after the batch may change. The server has done that, and the rest of the
    batch, or is about to: a value that was written now would stand where it has been replaced or deleted."""
    changed, unknown = set(behind), set(unknown)
    again: list[Command] = []
    for command in reversed(commands):
        if command not in unknown:
            changed.update(command.changes)
        elif command.script not in LATE_IS_WRONG or changed.isdisjoint(command.changes):
            again.append(command)  # What is done under a lease finds out by itself whether the lease is still there.
        elif command.parts is None:
            command.fail(overtaken())
        else:
            again += reversed(_sendable_again(parts := command.parts(), parts, changed))
    again.reverse()
    return again


class Countdown:
    """A batch under way: its commands, and what to call when each has its answer."""

    def __init__(self, commands: Sequence[Command], done: Callable[[], object]) -> None:
        self.trips: list[RoutedCommand] = []
        self._left = 0
        self._done = done
        for command in commands:
            self.add(command)

    @property
    def last_progress(self) -> float:
        """When bytes last moved on the connection, of those that still owe an answer, on which it is longest ago."""
        carriers = {each.connection for each in self.trips if each.connection is not None}
        return min((each.last_progress for each in carriers), default=float("-inf"))

    def add(self, command: Command, *, follows: RoutedCommand | None = None, hops: int = 0) -> RoutedCommand:
        """Take in one command more."""
        trip = RoutedCommand(command, slot_of(command.key), command.packed(), self, follows, hops)
        self.trips.append(trip)
        self._left += 1
        return trip

    def one_done(self) -> None:
        """A command has its answer; the last one answers the batch."""
        self._left -= 1
        if not self._left:
            self.trips = []  # They refer to the batch.
            self._done()


class RoutedCommand(Struct, eq=False):
    """A command on its way through the cluster, on a `connection` while it has no answer.

    `asking` is set if a server takes it though the slot is another's yet, `whole` if the server does not know the script by
    its name. It `follows` another whose answer needs it, which is `followed_by` so many.
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
        """The trip that it follows, or the one which that follows."""
        return self if self.follows is None else self.follows.first
