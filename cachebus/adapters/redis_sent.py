"""Batches on a connection: what was sent, and what becomes of the replies.

Each reply is read alone: what cannot be read is an error of its own request, and neither the batch nor the connection is
the worse for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import hiredis

from cachebus.actors.ports import OnReplies
from cachebus.messages import CacheConnectionError, CacheError

from .redis_commands import Command, changes, sendable_again
from .redis_connection import RedisConnection, pack_words
from .redis_errors import BACKEND, STALE_ROLE, code_of
from .redis_reads import Gets
from .redis_tags import TagSpace
from .redis_values import HasTags, read_run


class SentGets:
    """A run of `Get`s as one `MGET`: the commonest batch, in a third of the time that a plan takes."""

    __slots__ = ("_connection", "_names", "_on_replies", "_places", "_space")

    wanted = 1

    def __init__(
        self, prefix: str, keys: Sequence[str], connection: RedisConnection, on_replies: OnReplies, space: TagSpace
    ) -> None:
        names = [prefix + key for key in keys]
        wanted = dict.fromkeys(names)
        self._names: Sequence[str] = names
        self._places: list[int] | None = None
        if len(wanted) < len(names):  # Equal keys share a place.
            at = {name: place for place, name in enumerate(wanted)}
            self._names, self._places = tuple(wanted), [at[name] for name in names]
        self._connection = connection
        self._on_replies = on_replies
        self._space = space

    def send(self) -> bool:
        """Send it. `False` if a key is no valid Unicode, and nothing was sent."""
        try:
            data = pack_words(("MGET", *self._names))
        except UnicodeEncodeError:
            return False
        self._connection.send(data, self)
        return True

    def changes(self) -> Iterable[Any]:
        """Nothing: it reads."""
        return ()

    def answer(self, replies: Sequence[Any] | CacheError) -> None:
        """Take the one reply; or why there is none."""
        if type(replies) is list and type(values := replies[0]) is list:
            if self._places is not None:
                values = [values[place] for place in self._places]
            try:
                found = read_run(values, self._connection.now())
            except HasTags:
                pass
            else:
                self._on_replies(found)
                return
        # An error, or entries whose tags have to be looked up.
        keys = {name: place for place, name in enumerate(self._names)}
        places = list(range(len(keys))) if self._places is None else self._places
        made: list[Any] = [None] * len(places)
        command = Gets(made, 0, keys, places, self._space, checked=False).command()
        SentCommands([command], self._connection, made, self._on_replies).answer(replies)


class SentCommands:
    """The commands of a plan. `replies` fills up as they are answered, and then goes to `on_replies`."""

    __slots__ = ("_commands", "_connection", "_on_replies", "_replies", "wanted")

    def __init__(
        self, commands: Sequence[Command], connection: RedisConnection, replies: list[Any], on_replies: OnReplies
    ) -> None:
        self.wanted = len(commands)
        self._commands = commands
        self._connection = connection
        self._replies = replies
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
            self._on_replies(self._replies)
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
            self._on_replies(self._replies)
            return
        data = [*(each.packed(whole=True) for each in again), *(each.packed() for each in more)]
        self._commands = [*again, *more]
        self.wanted = len(data)
        connection.send(b"".join(data), self)
