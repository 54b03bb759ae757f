"""The counters of tags in a Redis Cluster, where they are in another slot than the entries.

A stamp is read before what it is for is begun: before a lease is asked for, and before a value is written. So what is
invalidated meanwhile is invalid when it is stored, because its stamp is older than the counter. An answer that depends on
counters is a `Doubt` until they are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from msgspec import Struct

from cachebus.messages import (
    Add,
    BadMessage,
    CacheError,
    CompareAndSet,
    Failed,
    GetOrLease,
    Reply,
    Request,
    Set,
    SetMany,
)

from .forms import unpack_plain
from .redis_commands import Command
from .redis_connection import Argument
from .redis_entry import NO_STAMP, Claim, TagSpace, claim_of, milliseconds, new_epoch, pack_tags
from .redis_leases import Leases, kept_for
from .redis_scripts import KEEP, STAMP


class Doubt(NamedTuple):
    """The reply in a place, which depends on whether claims hold: `decide` takes that, and gives the reply, or a command to
    be sent; `None` if it has put the reply in its place itself."""

    claims: Sequence[Claim]
    decide: Callable[[Sequence[bool]], Reply | Command | None]
    replies: list[Any]
    at: int


class Counters(Struct, eq=False):
    """The counters that some commands of a batch need. They are asked for together with these if a store has an idea which
    they are, and after them if not.

    They may have been read before the entries: an invalidation in between has not returned to a caller that asks after it.
    With `px` the counters are kept for an entry that shall live for so many milliseconds (`""`: for ever).
    """

    space: TagSpace
    ordered: bool = False
    px: str | None = None
    asked: dict[str, None] = {}
    known: dict[str, bytes | None] = {}
    left: int = 0
    waiting: list[Doubt] = []
    error: CacheError | None = None

    def want(self, tags: Sequence[str]) -> None:
        """Ask for the counters of tags together with the rest."""
        self.asked.update(dict.fromkeys(tags))

    def command(self) -> Command | None:
        """The command that asks for what is wanted."""
        return self._fetch(list(self.asked)) if self.asked else None

    def judge(self, doubts: Sequence[Doubt]) -> list[Command]:
        """Decide what is known, and return what has to be sent."""
        if self.left:
            self.waiting += doubts
            return []
        if self.error is not None:
            for doubt in doubts:
                doubt.replies[doubt.at] = Failed.of(self.error)
            return []
        tags = (tag for doubt in doubts for claim in doubt.claims for tag in claim.tags)
        if unknown := dict.fromkeys(tag for tag in tags if tag not in self.known):
            self.waiting += doubts
            return [self._fetch(list(unknown))]
        commands: list[Command] = []
        for doubt in doubts:
            decided = doubt.decide([claim.holds(self.known) for claim in doubt.claims])
            if isinstance(decided, Command):
                commands.append(decided)
            elif decided is not None:
                doubt.replies[doubt.at] = decided
        return commands

    def _fetch(self, tags: list[str]) -> Command:
        self.left += 1
        names = [self.space.counter(tag) for tag in tags]

        def settle(reply: Any, now: float) -> Sequence[Command]:
            self.known.update(zip(tags, reply, strict=True))
            return self._answered()

        def fail(error: CacheError) -> None:
            self.error = error
            self._answered()

        def parts() -> list[Command]:
            self.left -= 1
            return [self._fetch([tag]) for tag in tags]

        script = None if self.px is None else KEEP
        words: list[Argument] = ["MGET", *names] if self.px is None else [len(names), *names, self.px]
        more = parts if len(tags) > 1 else None
        return Command(words, names[0], settle, fail, script=script, parts=more, ordered=self.ordered)

    def _answered(self) -> Sequence[Command]:
        self.left -= 1
        if self.left or not self.waiting:
            return ()
        waiting, self.waiting = self.waiting, []
        return self.judge(waiting)


def lease_claims(request: Leases, reply: Any) -> tuple[Claim | None, Claim | None]:
    """What the reply to a question about a lease depends on: the claim of the lease or of the value that is there, whose
    loss makes the question one to be asked again; and that of the value that is served stale."""
    if not isinstance(request, GetOrLease):
        return (_declared(*reply) if isinstance(reply, list) else None), None
    kind = reply[0]
    if kind == 2:
        return _declared(reply[4], reply[5]), claim_of(reply[3])
    return (None, claim_of(reply[1])) if kind else (claim_of(reply[1]), None)


def _declared(stamp: bytes, tags: bytes) -> Claim | None:
    return Claim(stamp, tuple(unpack_plain(tags))) if tags else None


# Before a batch goes out

_STORING = frozenset({Set, SetMany, Add, CompareAndSet})


def wants_stamps(batch: Sequence[Request[Any]], space: TagSpace) -> bool:
    """Whether something in a batch has tags, or may get some that only its loader knows."""
    return any(_wants_stamp(request, space) for request in batch)


def _wants_stamp(request: Any, space: TagSpace) -> bool:
    kind = cast("type[object]", type(request))
    return bool((kind in _STORING and request.tags) or (kind is GetOrLease and (space.seen or request.tags)))


def looks_for_tags(batch: Sequence[Request[Any]], space: TagSpace) -> Command | None:
    """The command beside leases that finds out whether the namespace has tags, while this store knows of none."""
    if space.seen or not any(type(request) is GetOrLease for request in batch):
        return None

    def settle(there: Any, now: float) -> None:
        space.seen = space.seen or bool(there)

    return Command(["EXISTS", space.sequence], space.sequence, settle, lambda error: None)


class Stamps:
    """The stamps of the requests of a batch: `commands` ask for them, `by_place` has them then, or why there are none."""

    def __init__(self, batch: Sequence[Request[Any]], space: TagSpace, default_ttl: float | None) -> None:
        self.by_place: dict[int, bytes | CacheError] = {}
        groups: dict[str, list[tuple[int, Any]]] = {}
        request: Any
        for place, request in enumerate(batch):
            if not _wants_stamp(request, space):
                continue
            try:
                pack_tags(request.tags)
                groups.setdefault(_kept(request, default_ttl), []).append((place, request))
            except (CacheError, ValueError, OverflowError):
                # It will be refused.
                self.by_place[place] = BadMessage("the request is not understood")
        space.seen = True
        self.commands = [self._command(space, px, members) for px, members in groups.items()]

    def _command(self, space: TagSpace, px: str, members: Sequence[tuple[int, Any]]) -> Command:
        tags = list(dict.fromkeys(tag for _, request in members for tag in request.tags))
        names = [space.sequence, *(space.counter(tag) for tag in tags)]
        words: list[Argument] = [len(names), *names, new_epoch(), px]

        def settle(reply: Any, now: float) -> None:
            counters = dict(zip(tags, reply[1:], strict=True))
            for place, request in members:
                # What is stored under a lease has the stamp of that, and is only compared with the counters.
                leased = isinstance(request, Set) and request.lease is not None and request.tags
                self.by_place[place] = max(counters[tag] for tag in request.tags) if leased else reply[0]

        def fail(error: CacheError) -> None:
            # Without a stamp a lease is as good for what will have no tags.
            self.by_place.update((place, error if request.tags else NO_STAMP) for place, request in members)

        return Command(words, names[0], settle, fail, script=STAMP)


def _kept(request: Any, default_ttl: float | None) -> str:
    """For how many milliseconds the counters of a request are needed."""
    if isinstance(request, GetOrLease):
        return milliseconds(request.lease_ttl)
    px = milliseconds(default_ttl if request.ttl == "default" else request.ttl)
    return kept_for(request, px) if isinstance(request, Set) else px
