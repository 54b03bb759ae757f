"""Runs of reads: one `MGET` or one script for all of them, and what their replies say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cachebus.messages import CacheError, Failed, Found, Missing

from .redis_commands import Command
from .redis_connection import Argument
from .redis_counters import Counters, Doubt
from .redis_tag_scripts import READ
from .redis_tags import TagSpace, read_tagged
from .redis_values import MISSING, HasTags, read_or_fail


class Reads:
    """A command that reads: who wants which of its keys. With `counters` these are in another slot; `checked` says that
    the server leaves out what is not valid."""

    __slots__ = ("_checked", "_counters", "_prefix", "_replies", "_space", "_wants", "keys")

    def __init__(
        self, replies: list[Any], prefix: int, space: TagSpace, counters: Counters, *, checked: bool | None = None
    ) -> None:
        self.keys: dict[str, int] = {}
        self._wants: list[tuple[int, int, str]] = []
        self._replies = replies
        self._prefix = prefix
        self._space = space
        self._counters = counters
        self._checked = space.here and space.seen if checked is None else checked

    def want(self, position: int, key: str) -> None:
        self._wants.append((position, self.keys.setdefault(key, len(self.keys)), key))

    def command(self) -> Command:
        parts = self.parts if len(self.keys) > 1 else None
        script = READ if self._checked else None
        words: list[Argument] = [len(self.keys), *self.keys] if self._checked else ["MGET", *self.keys]
        return Command(words, next(iter(self.keys)), self.settle, self.fail, script=script, parts=parts)

    def parts(self) -> list[Command]:
        """The same, a key at a time."""
        checked = self._checked
        alone = [Reads(self._replies, self._prefix, self._space, self._counters, checked=checked) for _ in self.keys]
        for position, place, key in self._wants:
            alone[place].want(position, key)
        return [each.command() for each in alone]

    def settle(self, reply: Any, now: float) -> Sequence[Command]:
        doubts: list[Doubt] = []
        for position, place, key in self._wants:
            raw = reply[place]
            # Taken apart for each, so that no two callers share a list or a dict.
            try:
                self._put(position, key, MISSING if raw is None else read_or_fail(raw, now))
            except HasTags:
                self._tagged(position, key, reply[place], now, doubts)
        return self._counters.judge(doubts) if doubts else ()

    def _tagged(self, position: int, key: str, raw: bytes, now: float, doubts: list[Doubt]) -> None:
        claim, answer = read_tagged(raw, now)
        if claim is not None:
            self._space.learn(key[self._prefix :], claim.tags)
        if claim is None or self._checked:
            self._put(position, key, answer)
            return

        def decide(holds: Sequence[bool]) -> None:
            self._put(position, key, answer if holds[0] else MISSING)

        def fail(error: CacheError) -> None:
            self._replies[position] = Failed.of(error)

        doubts.append(Doubt((claim,), decide, fail))

    def _put(self, position: int, key: str, answer: Found | Missing | Failed) -> None:
        whole = self._replies[position]
        if whole is None:
            self._replies[position] = answer
        elif type(whole) is dict:
            if isinstance(answer, Found):
                whole[key[self._prefix :]] = answer
            elif answer is not MISSING:
                self._replies[position] = answer

    def fail(self, error: CacheError) -> None:
        for position, _, _ in self._wants:
            self._replies[position] = Failed.of(error)
