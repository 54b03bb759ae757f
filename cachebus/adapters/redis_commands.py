"""Redis commands under way: what is sent, and what becomes of the reply."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, cast

import hiredis
from msgspec import Struct

from cachebus.messages import CacheError, CacheSerializationError, Failed

from .redis_connection import Argument, pack_words
from .redis_errors import in_doubt, overtaken, translate
from .redis_script import Script
from .redis_scripts import LATE_IS_WRONG, READING

Settle = Callable[[Any, float], "Sequence[Command] | None"]
"""Takes in a reply; told the server's Unix time in seconds. What it returns has to be sent before the answer is whole."""


UNREADABLE = (CacheError, ValueError, TypeError, LookupError, AttributeError, OverflowError, struct.error)
"""What reading a reply raises whose bytes are not ours, or damaged: an error of its own request, and of no other."""


def unreadable(error: Exception) -> Failed:
    """The reply in place of one that cannot be read."""
    if not isinstance(error, CacheError):
        kind = type(error).__name__
        error = CacheSerializationError(f"the server's reply could not be understood ({kind})")
    return Failed.of(error)


class Command(Struct, eq=False):
    """One Redis command: its words, the key that says which node it goes to, and what to do with its reply.

    `writes` is false where doing it twice does what doing it once does. `parts` makes of a command about several keys
    one for each; it may be `None` where there is one key only. What is `ordered` must not be overtaken by what was sent
    after the command that it follows from.
    """

    words: list[Argument]
    key: str
    settle: Settle
    fail: Callable[[CacheError], None]
    script: Script | None = None
    writes: bool = False
    parts: Callable[[], list[Command]] | None = None
    ordered: bool = False

    @property
    def changes(self) -> Sequence[Any]:
        """The keys that it may change."""
        if self.script is not None:
            return () if self.script in READING else self.words[1 : 1 + cast("int", self.words[0])]
        return () if self.words[0] in _READS else self.words[1:]

    def packed(self, *, whole: bool = False) -> bytes:
        """The command as bytes; `whole` sends a script's text instead of its name."""
        if self.script is None:
            return pack_words(tuple(self.words))
        name = ("EVAL", self.script.text) if whole else ("EVALSHA", self.script.sha)
        return pack_words((*name, *self.words))

    def take(self, reply: Any, now: float) -> Sequence[Command]:
        """Take in the reply, and say what has to be sent on. `now` is the server's Unix time in seconds."""
        if isinstance(reply, hiredis.ReplyError):
            self.fail(translate(reply))
            return ()
        try:
            return self.settle(reply, now) or ()
        except UNREADABLE as error:
            self.fail(unreadable(error).error())
        return ()

    def give_up(self, error: CacheError) -> None:
        """Take in that the connection was lost after the command was sent."""
        self.fail(in_doubt(error) if self.writes else error)


_READS = frozenset({"MGET", "GETRANGE", "SCAN"})


def changes(commands: Iterable[Command]) -> Iterable[Any]:
    """The keys that commands may change."""
    return chain.from_iterable(command.changes for command in commands)


def sendable_again(commands: Sequence[Command], unknown: Iterable[Command], behind: Iterable[Any]) -> Sequence[Command]:
    """Of a batch, those of the commands `unknown` to the server that may be sent once more; the others are failed.

    `behind` are keys that what was sent after the batch may change. The server has done that, and the rest of the batch, or
    is about to: a value that was written now would stand where it has been replaced or deleted.
    """
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
            again += reversed(sendable_again(parts := command.parts(), parts, changed))
    again.reverse()
    return again


def unlink(names: Sequence[str], settle: Settle, fail: Callable[[CacheError], None]) -> Command:
    """One `UNLINK` of keys that go together. `settle` is told of each part, if it is sent in parts."""

    def parts() -> list[Command]:
        return [unlink([name], settle, fail) for name in names]

    return Command(["UNLINK", *names], names[0], settle, fail, parts=parts if len(names) > 1 else None)
