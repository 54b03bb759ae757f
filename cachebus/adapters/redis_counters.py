"""What depends on the counters of tags, until they are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cachebus.messages import CacheError, GetOrLease, NotHeld, RenewLease, Reply

from .forms import unpack_plain
from .redis_commands import Command
from .redis_connection import Argument
from .redis_leases import Leases, Parsed
from .redis_tag_scripts import KEEP
from .redis_tags import Claim, TagSpace, all_tags, split_tagged
from .redis_values import HEADER, TAGGED


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


# Single commands whose answer depends on counters that their script cannot see

Answer = Callable[[Reply], None]
Put = Callable[[bool], None]
Fail = Callable[[CacheError], None]
Again = Callable[[bytes], Command]
"""Makes the command once more, with what is known of the counters."""


def _claim_of(raw: Any) -> Claim | None:
    """What an entry is valid by, if it has tags. Raises `CacheSerializationError`."""
    tagged = type(raw) is bytes and len(raw) > HEADER.size and raw[HEADER.size] == TAGGED
    return split_tagged(raw)[0] if tagged else None


def _declared(stamp: bytes, tags: bytes) -> Claim | None:
    return Claim(stamp, tuple(unpack_plain(tags))) if tags else None


def settle_lease(
    request: Leases, reply: Any, now: float, make: Parsed, put: Answer, fail: Fail, again: Again, space: TagSpace
) -> Sequence[Command]:
    """Take in the reply to a question about a lease: answer it, or say what has to be sent first."""
    if type(request) is RenewLease:
        return _settle_renewal(reply, now, make, put, fail, space)
    if not isinstance(request, GetOrLease):
        put(make(reply, now))
        return ()
    kind = reply[0]
    # What it is about, whose loss makes the question one to be asked again; and what is served stale.
    about = _declared(reply[4], reply[5]) if kind == 2 else _claim_of(reply[1]) if kind == 0 else None
    stale = _claim_of(reply[3] if kind == 2 else reply[1]) if kind else None
    if about is None and stale is None:
        put(make(reply, now))
        return ()
    claims = [each for each in (about, stale) if each is not None]

    def decide(holds: Sequence[bool]) -> Command | None:
        if about is not None and not holds[0]:
            return again(about.verdict(False))
        if stale is not None and not holds[-1]:
            reply[3 if kind == 2 else 1] = b""
        put(make(reply, now))
        return None

    return Counters(space).judge([Doubt(claims, decide, fail)])


def _settle_renewal(
    reply: Any, now: float, make: Parsed, put: Answer, fail: Fail, space: TagSpace
) -> Sequence[Command]:
    if isinstance(reply, int):
        put(make(reply, now))
        return ()
    claim = Claim(reply[0], tuple(unpack_plain(reply[1])))

    def decide(holds: Sequence[bool]) -> None:
        put(make(1, now) if holds[0] else NotHeld())

    return Counters(space).judge([Doubt((claim,), decide, fail)])


def settle_head(
    head: bytes, put: Put | None, fail: Fail, again: Again | None, space: TagSpace, px: str | None = None
) -> Sequence[Command]:
    """Find out about the entry whose head was the reply: tell `put` that it is valid, or that it is not; or send the command
    once more, if there is one for that. With `px` the counters are kept for so many milliseconds."""
    try:
        claim = _claim_of(head)
    except CacheError as error:
        fail(error)
        return ()
    if claim is None:
        claim = Claim(b"", ())

    def decide(holds: Sequence[bool]) -> Command | None:
        if again is not None and (holds[0] or put is None):
            return again(claim.verdict(holds[0]))
        if put is not None:
            put(holds[0])
        return None

    return Counters(space, ordered=again is not None, px=px).judge([Doubt((claim,), decide, fail)])
