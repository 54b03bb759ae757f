"""Runs of writes: one call of the script that writes, for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from cachebus.messages import CacheError, Failed, NotStored, Stored

from .redis_commands import Command
from .redis_connection import Argument
from .redis_counters import Counters, Doubt
from .redis_scripts import WRITE
from .redis_tags import TagSpace, split_tagged
from .redis_values import HEADER


class Writes:
    """One call of the script that writes. `size` is the bytes of its values, `tagged` says that some have tags."""

    __slots__ = ("_arguments", "_keys", "_positions", "_replies", "_space", "size", "tagged")

    def __init__(self, replies: list[Any], space: TagSpace) -> None:
        self.size = 0
        self._keys: list[str] = []
        self._arguments: list[Argument] = []
        self._positions: list[int] = []
        self._replies = replies
        self._space = space
        self.tagged = False

    def add(self, position: int, key: str, body: bytes, px: str, condition: str) -> None:
        """A negative position is that of a `SetMany`, -1 for the first: its reply stands already."""
        self._positions.append(position)
        self._keys.append(key)
        self._arguments += (body, px, condition)
        self.size += len(body)

    def command(self, verdict: bytes = b"") -> Command:
        """The command. `verdict` is what is known of the counters, where the script cannot look for itself."""
        words: list[Argument] = [len(self._keys), *self._keys, *self._arguments]
        if verdict or self.tagged:
            words.append(verdict or "t")
        parts = self.parts if len(self._keys) > 1 else None
        script = WRITE.here if self._space.here else WRITE.elsewhere
        command = Command(words, self._keys[0], self.settle, self.fail, script=script, writes=True, parts=parts)
        if verdict:
            command.ordered = True
        return command

    def parts(self) -> list[Command]:
        """The same, a key at a time, each key's in their order."""
        alone: dict[str, Writes] = {}
        for place, key in enumerate(self._keys):
            writes = alone.setdefault(key, Writes(self._replies, self._space))
            writes.tagged = self.tagged
            writes.add(*self._at(place))
        return [each.command() for each in alone.values()]

    def settle(self, reply: Any, now: float) -> Sequence[Command]:
        replies = self._replies
        try:
            for position, version in zip(self._positions, reply, strict=True):
                if position >= 0:
                    replies[position] = Stored(float(version)) if version > 0 else NotStored(float(-version))
        except TypeError:  # The head of an entry.
            return self._settle_with_doubts(reply)
        return ()

    def _settle_with_doubts(self, reply: Any) -> Sequence[Command]:
        doubts: list[Doubt] = []
        for place, (position, version) in enumerate(zip(self._positions, reply, strict=True)):
            if isinstance(version, bytes):
                self._doubt(place, version, doubts)
            elif position >= 0:
                self._replies[position] = Stored(float(version)) if version > 0 else NotStored(float(-version))
        return Counters(self._space, ordered=True).judge(doubts)

    def fail(self, error: CacheError) -> None:
        for position in self._positions:
            self._replies[position if position >= 0 else -1 - position] = Failed.of(error)

    def _at(self, place: int) -> tuple[int, str, bytes, str, str]:
        body, px, condition = self._arguments[3 * place : 3 * place + 3]
        return self._positions[place], self._keys[place], cast("bytes", body), str(px), str(condition)

    def _doubt(self, place: int, head: bytes, doubts: list[Doubt]) -> None:
        """Write one of the keys once more when it is known whether what is there is valid."""
        alone = Writes(self._replies, self._space)
        alone.tagged = self.tagged
        alone.add(*self._at(place))
        try:
            claim, _ = split_tagged(head)
        except CacheError as error:
            alone.fail(error)
            return

        def decide(holds: Sequence[bool]) -> Command | None:
            refused = alone.refused(HEADER.unpack_from(head)[0] if holds[0] else 0.0)
            return alone.command(claim.verdict(holds[0])) if refused is None else None

        doubts.append(Doubt((claim,), decide, alone.fail))

    def refused(self, version: float) -> NotStored | None:
        """The answer to a write whose condition does not hold: what is there has `version`, 0 where nothing is valid."""
        condition = self._arguments[2]
        if version if condition == "absent" else not version or condition not in ("present", repr(version)):
            reply = self._replies[self._positions[0]] = NotStored(version)
            return reply
        return None
