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
from .redis_values import HEADER, TAGGED


class Writes:
    """One call of the script that writes. `size` is the bytes of its values."""

    __slots__ = ("_arguments", "_keys", "_positions", "_replies", "_space", "_tagged", "size")

    def __init__(self, replies: list[Any], space: TagSpace) -> None:
        self.size = 0
        self._keys: list[str] = []
        self._arguments: list[Argument] = []
        self._positions: list[int] = []
        self._replies = replies
        self._space = space
        self._tagged = False

    def add(self, position: int, key: str, body: bytes, px: str, condition: str) -> None:
        """A negative position is that of a `SetMany`, -1 for the first: its reply stands already."""
        self._positions.append(position)
        self._keys.append(key)
        self._arguments += (body, px, condition)
        self.size += len(body)
        if body[0] == TAGGED:
            self._tagged = True

    def command(self, verdict: bytes = b"") -> Command:
        """The command. `verdict` is what is known of the counters, where the script cannot look for itself."""
        more: tuple[Argument, ...] = (verdict or "t",) if verdict or self._tagged else ()
        words: list[Argument] = [len(self._keys), *self._keys, *self._arguments, *more]
        parts = self.parts if len(self._keys) > 1 else None
        script = WRITE.at(self._space.here)
        return Command(
            words,
            self._keys[0],
            self.settle,
            self.fail,
            script=script,
            writes=True,
            parts=parts,
            ordered=bool(verdict),
        )

    def parts(self) -> list[Command]:
        """The same, a key at a time, each key's in their order."""
        alone: dict[str, Writes] = {}
        for place, key in enumerate(self._keys):
            alone.setdefault(key, Writes(self._replies, self._space)).add(*self._at(place))
        return [each.command() for each in alone.values()]

    def settle(self, reply: Any, now: float) -> Sequence[Command]:
        replies = self._replies
        doubts: list[Doubt] = []
        for place, (position, version) in enumerate(zip(self._positions, reply, strict=True)):
            if type(version) is bytes:
                self._doubt(place, version, doubts)
            elif position >= 0:
                replies[position] = Stored(float(version)) if version > 0 else NotStored(float(-version))
        return Counters(self._space, ordered=True).judge(doubts) if doubts else ()

    def fail(self, error: CacheError) -> None:
        for position in self._positions:
            self._replies[position if position >= 0 else -1 - position] = Failed.of(error)

    def _at(self, place: int) -> tuple[int, str, bytes, str, str]:
        body, px, condition = self._arguments[3 * place : 3 * place + 3]
        return self._positions[place], self._keys[place], cast("bytes", body), str(px), str(condition)

    def _doubt(self, place: int, head: bytes, doubts: list[Doubt]) -> None:
        """Write one of the keys once more when it is known whether what is there is valid."""
        alone = Writes(self._replies, self._space)
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
