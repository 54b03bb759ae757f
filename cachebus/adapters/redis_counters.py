"""What depends on the counters of tags, until they are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cachebus.messages import CacheError

from .redis_commands import Command
from .redis_connection import Argument
from .redis_tag_scripts import KEEP
from .redis_tags import Claim, TagSpace, all_tags


class Doubt(NamedTuple):
    """An answer that depends on whether claims hold. `decide` is told, and says what has to be sent then, if anything."""

    claims: Sequence[Claim]
    decide: Callable[[Sequence[bool]], Command | None]
    fail: Callable[[CacheError], None]


class Counters:
    """The counters that some commands of a batch need: asked for together with these, where a store has an idea which they
    are, and after them, where it has not.

    They may have been read before the entries: an invalidation in between has not returned to anybody who asks after it.
    With `px` the counters are kept for an entry that shall live for so many milliseconds (`""`: for ever).
    """

    __slots__ = ("_asked", "_error", "_known", "_left", "_ordered", "_px", "_space", "_waiting")

    def __init__(self, space: TagSpace, *, ordered: bool = False, px: str | None = None) -> None:
        self._space = space
        self._ordered = ordered
        self._px = px
        self._asked: dict[str, None] = {}
        self._known: dict[str, bytes | None] = {}
        self._left = 0
        self._waiting: list[Doubt] = []
        self._error: CacheError | None = None

    def want(self, tags: Sequence[str]) -> None:
        """Ask for the counters of tags together with the rest."""
        self._asked.update(dict.fromkeys(tags))

    def command(self) -> Command | None:
        """The command that asks for what is wanted."""
        return self._fetch(list(self._asked)) if self._asked else None

    def judge(self, doubts: Sequence[Doubt]) -> Sequence[Command]:
        """Decide what is known, and say what has to be sent."""
        if self._left:
            self._waiting += doubts
            return ()
        if self._error is not None:
            for doubt in doubts:
                doubt.fail(self._error)
            return ()
        unknown = [
            tag for tag in all_tags(claim for doubt in doubts for claim in doubt.claims) if tag not in self._known
        ]
        if unknown:
            self._waiting += doubts
            return [self._fetch(unknown)]
        decided = [doubt.decide([claim.holds(self._known) for claim in doubt.claims]) for doubt in doubts]
        return [command for command in decided if command is not None]

    def _fetch(self, tags: list[str]) -> Command:
        self._left += 1
        return self._of(tags)

    def _of(self, tags: list[str]) -> Command:
        names = [self._space.counter(tag) for tag in tags]

        def settle(reply: Any, now: float) -> Sequence[Command]:
            self._known.update(zip(tags, reply, strict=True))
            return self._answered()

        def fail(error: CacheError) -> None:
            self._error = error
            self._answered()

        def parts() -> list[Command]:
            self._left += len(tags) - 1
            return [self._of([tag]) for tag in tags]

        more = parts if len(tags) > 1 else None
        if self._px is None:
            words: list[Argument] = ["MGET", *names]
            return Command(words, names[0], settle, fail, parts=more, ordered=self._ordered)
        words = [len(names), *names, self._px]
        return Command(words, names[0], settle, fail, script=KEEP, parts=more, ordered=self._ordered)

    def _answered(self) -> Sequence[Command]:
        self._left -= 1
        if self._left or not self._waiting:
            return ()
        waiting, self._waiting = self._waiting, []
        return self.judge(waiting)
