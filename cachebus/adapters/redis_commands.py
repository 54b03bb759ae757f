"""Redis commands under way: what is sent, and what becomes of the reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, cast

import hiredis

from cachebus.messages import CacheError, Failed, Found, FoundMany, NotStored, Stored

from .redis_connection import Argument, pack_words
from .redis_errors import in_doubt, overtaken, translate
from .redis_scripts import SCRIPTS, WRITE, Script
from .redis_values import MISSING, read_or_fail

Settle = Callable[[Any, float], None]
"""Takes in a reply; told the server's Unix time in seconds."""


class Command:
    """One Redis command: its words, the key that says which node it goes to, and what to do with its reply.

    `writes` is false where doing it twice does what doing it once does. `parts` makes of a command about several keys
    one for each; it may be `None` where there is one key only.
    """

    __slots__ = ("fail", "key", "parts", "script", "settle", "words", "writes")

    def __init__(
        self,
        words: list[Argument],
        key: str,
        settle: Settle,
        fail: Callable[[CacheError], None],
        *,
        script: Script | None = None,
        writes: bool = False,
        parts: Callable[[], list[Command]] | None = None,
    ) -> None:
        self.words = words
        self.key = key
        self.settle = settle
        self.fail = fail
        self.script = script
        self.writes = writes
        self.parts = parts

    @property
    def changes(self) -> Sequence[Any]:
        """The keys that it may change."""
        if self.script is not None:
            return self.words[1 : 1 + cast("int", self.words[0])]
        return () if self.words[0] in _READS else self.words[1:]

    def packed(self, *, whole: bool = False) -> bytes:
        """The command as bytes; `whole` sends a script's text instead of its name."""
        if self.script is None:
            return pack_words(tuple(self.words))
        name = ("EVAL", self.script.text) if whole else ("EVALSHA", self.script.sha)
        return pack_words((*name, *self.words))

    def take(self, reply: Any, now: float) -> None:
        """Take in the reply. `now` is the server's Unix time in seconds."""
        if isinstance(reply, hiredis.ReplyError):
            self.fail(translate(reply))
        else:
            self.settle(reply, now)

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
        elif command.script not in SCRIPTS or changed.isdisjoint(command.changes):
            again.append(command)  # What is done under a lease finds out by itself whether the lease is still there.
        elif command.parts is None:
            command.fail(overtaken())
        else:
            again += reversed(sendable_again(parts := command.parts(), parts, changed))
    again.reverse()
    return again


class Reads:
    """One `MGET`: who wants which of its keys."""

    __slots__ = ("_prefix", "_replies", "_wants", "keys")

    def __init__(self, replies: list[Any], prefix: int) -> None:
        self.keys: dict[str, int] = {}
        self._wants: list[tuple[int, int, str]] = []
        self._replies = replies
        self._prefix = prefix

    def want(self, position: int, key: str) -> None:
        self._wants.append((position, self.keys.setdefault(key, len(self.keys)), key))

    def command(self) -> Command:
        parts = self.parts if len(self.keys) > 1 else None
        return Command(["MGET", *self.keys], next(iter(self.keys)), self.settle, self.fail, parts=parts)

    def parts(self) -> list[Command]:
        """The same, a key at a time."""
        alone = [Reads(self._replies, self._prefix) for _ in self.keys]
        for position, place, key in self._wants:
            alone[place].want(position, key)
        return [each.command() for each in alone]

    def settle(self, reply: Any, now: float) -> None:
        replies = self._replies
        for position, place, key in self._wants:
            raw = reply[place]
            # Taken apart for each, so that no two callers share a list or a dict.
            answer: Any = MISSING if raw is None else read_or_fail(raw, now)
            whole = replies[position]
            if whole is None:
                replies[position] = answer
            elif type(whole) is FoundMany:
                if isinstance(answer, Found):
                    whole.entries[key[self._prefix :]] = answer
                elif answer is not MISSING:
                    replies[position] = answer

    def fail(self, error: CacheError) -> None:
        for position, _, _ in self._wants:
            self._replies[position] = Failed.of(error)


class Gets:
    """One `MGET` for a run of `Get`s that begins at `first`: `places` says which of its keys each wants."""

    __slots__ = ("_first", "_keys", "_places", "_replies")

    def __init__(self, replies: list[Any], first: int, keys: dict[str, int], places: list[int]) -> None:
        self._replies = replies
        self._first = first
        self._keys = keys
        self._places = places

    def command(self) -> Command:
        return Command(["MGET", *self._keys], next(iter(self._keys)), self.settle, self.fail)

    def settle(self, reply: Any, now: float) -> None:
        raws = reply if len(reply) == len(self._places) else [reply[place] for place in self._places]
        self._replies[self._first : self._first + len(raws)] = [
            MISSING if raw is None else read_or_fail(raw, now) for raw in raws
        ]

    def fail(self, error: CacheError) -> None:
        count = len(self._places)
        self._replies[self._first : self._first + count] = [Failed.of(error)] * count


class Writes:
    """One call of the script that writes. `size` is the bytes of its values."""

    __slots__ = ("_arguments", "_keys", "_positions", "_replies", "size")

    def __init__(self, replies: list[Any]) -> None:
        self.size = 0
        self._keys: list[str] = []
        self._arguments: list[Argument] = []
        self._positions: list[int] = []
        self._replies = replies

    def add(self, position: int, key: str, body: bytes, px: str, condition: str) -> None:
        """A negative position is that of a `SetMany`, -1 for the first: its reply stands already."""
        self._positions.append(position)
        self._keys.append(key)
        self._arguments += (body, px, condition)
        self.size += len(body)

    def command(self) -> Command:
        words: list[Argument] = [len(self._keys), *self._keys, *self._arguments]
        parts = self.parts if len(self._keys) > 1 else None
        return Command(words, self._keys[0], self.settle, self.fail, script=WRITE, writes=True, parts=parts)

    def parts(self) -> list[Command]:
        """The same, a key at a time, each key's in their order."""
        alone: dict[str, Writes] = {}
        arguments = iter(self._arguments)
        for position, key, body, px, condition in zip(
            self._positions, self._keys, arguments, arguments, arguments, strict=True
        ):
            alone.setdefault(key, Writes(self._replies)).add(
                position, key, cast("bytes", body), str(px), str(condition)
            )
        return [each.command() for each in alone.values()]

    def settle(self, reply: Any, now: float) -> None:
        replies = self._replies
        for position, version in zip(self._positions, reply, strict=True):
            if position >= 0:
                replies[position] = Stored(float(version)) if version > 0 else NotStored(float(-version))

    def fail(self, error: CacheError) -> None:
        for position in self._positions:
            self._replies[position if position >= 0 else -1 - position] = Failed.of(error)


def unlink(names: Sequence[str], settle: Settle, fail: Callable[[CacheError], None]) -> Command:
    """One `UNLINK` of keys that go together. `settle` is told of each part, if it is sent in parts."""

    def parts() -> list[Command]:
        return [unlink([name], settle, fail) for name in names]

    return Command(["UNLINK", *names], names[0], settle, fail, parts=parts if len(names) > 1 else None)
