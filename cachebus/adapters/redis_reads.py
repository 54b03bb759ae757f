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


def _words(keys: dict[str, int], checked: bool) -> list[Argument]:
    return [len(keys), *keys] if checked else ["MGET", *keys]


class Reads:
    """A command that reads: who wants which of its keys. With `counters` these are in another slot; `checked` says that
    the server leaves out what is not valid."""

    __slots__ = ("_checked", "_counters", "_prefix", "_replies", "_space", "_wants", "keys")

    def __init__(self, replies: list[Any], prefix: int, space: TagSpace, counters: Counters) -> None:
        self.keys: dict[str, int] = {}
        self._wants: list[tuple[int, int, str]] = []
        self._replies = replies
        self._prefix = prefix
        self._space = space
        self._counters = counters
        self._checked = space.here and space.seen

    def want(self, position: int, key: str) -> None:
        self._wants.append((position, self.keys.setdefault(key, len(self.keys)), key))

    def command(self) -> Command:
        parts = self.parts if len(self.keys) > 1 else None
        script = READ if self._checked else None
        words = _words(self.keys, self._checked)
        return Command(words, next(iter(self.keys)), self.settle, self.fail, script=script, parts=parts)

    def parts(self) -> list[Command]:
        """The same, a key at a time."""
        alone = [Reads(self._replies, self._prefix, self._space, self._counters) for _ in self.keys]
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


class Gets:
    """One command for a run of `Get`s that begins at `first`: `places` says which of its keys each wants."""

    __slots__ = ("_checked", "_first", "_keys", "_places", "_replies", "_space")

    def __init__(
        self, replies: list[Any], first: int, keys: dict[str, int], places: list[int], space: TagSpace
    ) -> None:
        self._replies = replies
        self._first = first
        self._keys = keys
        self._places = places
        self._space = space
        self._checked = space.seen

    def command(self) -> Command:
        if self._checked:
            return Command(_words(self._keys, True), next(iter(self._keys)), self.settle, self.fail, script=READ)
        return Command(["MGET", *self._keys], next(iter(self._keys)), self.settle, self.fail)

    def settle(self, reply: Any, now: float) -> Sequence[Command]:
        raws = reply if len(reply) == len(self._places) else [reply[place] for place in self._places]
        try:
            self._replies[self._first : self._first + len(raws)] = [
                MISSING if raw is None else read_or_fail(raw, now) for raw in raws
            ]
        except HasTags:
            return self._settle_with_tags(raws, now)
        return ()

    def _settle_with_tags(self, raws: list[Any], now: float) -> Sequence[Command]:
        self._space.seen = True
        doubts: list[Doubt] = []
        for position, raw in enumerate(raws, self._first):
            try:
                self._replies[position] = MISSING if raw is None else read_or_fail(raw, now)
            except HasTags:
                claim, answer = read_tagged(raws[position - self._first], now)
                if claim is None or self._checked:
                    self._replies[position] = answer
                else:
                    doubts.append(self._doubt(position, claim, answer))
        return Counters(self._space).judge(doubts) if doubts else ()

    def _doubt(self, position: int, claim: Any, answer: Any) -> Doubt:
        def decide(holds: Sequence[bool]) -> None:
            self._replies[position] = answer if holds[0] else MISSING

        def fail(error: CacheError) -> None:
            self._replies[position] = Failed.of(error)

        return Doubt((claim,), decide, fail)

    def fail(self, error: CacheError) -> None:
        count = len(self._places)
        self._replies[self._first : self._first + count] = [Failed.of(error)] * count
