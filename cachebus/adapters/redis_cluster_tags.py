"""What a Redis Cluster has to be asked about tags before a batch goes out: the counters are in another slot than the entries.

A stamp is read before what it is for is begun: before a lease is asked for, and before a value is written. So what is
invalidated meanwhile is invalid when it is stored, because its stamp is older than the counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from cachebus.messages import (
    Add,
    BadMessage,
    CacheError,
    CompareAndSet,
    GetOrLease,
    Request,
    Set,
    SetMany,
)

from .redis_commands import Command
from .redis_connection import Argument
from .redis_leases import kept_for
from .redis_tag_scripts import STAMP
from .redis_tags import NO_STAMP, TagSpace, new_epoch, pack_tags
from .redis_values import milliseconds

_STORING = frozenset({Set, SetMany, Add, CompareAndSet})


def wants_stamps(batch: Sequence[Request[Any]], space: TagSpace) -> bool:
    """Whether something in a batch has tags, or may get some that only its loader knows."""
    return any(_wants_stamp(request, space) for request in batch)


def _wants_stamp(request: Any, space: TagSpace) -> bool:
    kind = cast("type[object]", type(request))
    return bool((kind in _STORING and request.tags) or (kind is GetOrLease and (space.seen or request.tags)))


def looks_for_tags(batch: Sequence[Request[Any]], space: TagSpace) -> Command | None:
    """What is asked beside leases while this store knows of no tags: whether the namespace has some all the same."""
    if space.seen or not any(type(request) is GetOrLease for request in batch):
        return None

    def settle(there: Any, now: float) -> None:
        space.seen = space.seen or bool(there)

    return Command(["EXISTS", space.sequence], space.sequence, settle, lambda error: None)


class Stamps:
    """The stamps of the requests of a batch: `commands` ask for them, `by_place` has them then, or why there are none."""

    def __init__(self, batch: Sequence[Request[Any]], space: TagSpace, default_ttl: float | None) -> None:
        self.by_place: dict[int, bytes | CacheError] = {}
        self._space = space
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
        self.commands = [self._command(px, members) for px, members in groups.items()]

    def _command(self, px: str, members: Sequence[tuple[int, Any]]) -> Command:
        tags = list(dict.fromkeys(tag for _, request in members for tag in request.tags))
        names = [self._space.sequence, *(self._space.counter(tag) for tag in tags)]
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
