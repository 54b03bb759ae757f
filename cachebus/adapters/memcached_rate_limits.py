"""Rate limits in Memcached: the rule of `rates`, written over what was read, under its CAS token.

What is under a limit's name is mostly what this connection has written there last. So it is written over at once, and read
in the same round trip: if no other client was there meanwhile, one round trip is all it takes. A client that was costs one
more, which knows already what it needs to know.

An item is four decimal numbers: level, Unix time of the server in microseconds, limit, and the microseconds of `per`. It
stands outside of the generations of the namespace, and goes when its level is at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from cachebus.messages import Admit, CacheError, Failed, Reply, Request

from .memcached_cas_updates import Draft, Item, outcome_of
from .memcached_connection import Answer, Exchange, read, store, unlike
from .memcached_entry import server_expiry
from .memcached_session import Session
from .memcached_values import Values
from .rates import Meter, admit, check_admit, microseconds

REMEMBERED = 10_000
"""Limits of which a connection remembers what it saw; then it forgets all of them, at the cost of a round trip for each."""

_RAW_MAX = 100
"""Bytes of an item of ours, at most."""


@dataclass(slots=True, eq=False)
class _Limit(Item):
    """A limit: what we take to be there, under its CAS token, and what is to be."""

    name: str
    before: Meter | None
    token: int
    meter: Meter | None
    reset: float = 0.0


class LimitUpdates:
    """Decides by what was last seen of a limit, and finds out in the same round trip whether that still stands."""

    unversioned = True

    def __init__(self, session: Session, values: Values) -> None:
        self._keys = values.keys
        self._connection = session.connection
        self._now = session.connection.now()

    def lookup(self, waiting: list[tuple[int, Request[Any]]], replies: list[Any]) -> Exchange[list[tuple[int, _Limit]]]:
        limits: dict[str, _Limit] = {}
        keyed: list[tuple[int, _Limit]] = []
        for position, request in waiting:
            assert isinstance(request, Admit)
            try:
                check_admit(request)
                name = self._keys.limit(request.key)
            except CacheError as error:
                replies[position] = Failed.of(error)
                continue
            if name not in limits:
                raw, token = self._connection.limits.get(name, (b"", 0))
                limits[name] = _Limit(name, before := _meter(raw), token, before)
            keyed.append((position, limits[name]))
        yield from ()
        return keyed

    def decide(self, request: Admit, item: _Limit) -> Reply | Draft:
        reply, meter = admit(request, item.meter, microseconds(self._now))
        item.meter = meter or item.meter
        item.reset = max(item.reset, getattr(reply, "reset_after", 0.0))
        draft: Draft = item.draft or Draft([], reply)
        draft.reply = reply
        return draft

    def commands(self, items: list[_Limit]) -> list[list[bytes]]:
        now, commands = self._connection.now(), list[list[bytes]]()
        for item in items:
            commands.append([read(item.name)])
            if item.meter is not item.before and item.meter is not None:
                condition = b" C%d" % item.token if item.token else b" ME"
                raw, seconds = b"%d %d %d %d" % item.meter, server_expiry(now + item.reset, now)
                commands[-1].insert(0, store(item.name, raw, seconds, condition))
        return commands

    def outcomes(self, items: list[_Limit], answers: list[list[Answer]]) -> list[Reply | CacheError | None]:
        return [self._outcome(item, its) for item, its in zip(items, answers, strict=True)]

    def _outcome(self, item: _Limit, answers: list[Answer]) -> Reply | CacheError | None:
        *wrote, seen = answers
        self._remember(item.name, seen)
        if wrote:
            token = outcome_of(wrote[0])
            if isinstance(token, int):
                return cast("Reply", item.draft.reply) if token else unlike()
            if token is not None:
                return token
        elif isinstance(seen, tuple) and seen[1] == item.token:
            return cast("Reply", item.draft.reply)  # It was decided by what is there.
        outcome = None if isinstance(seen, tuple) else outcome_of(seen)
        return unlike() if isinstance(outcome, int) else outcome

    def _remember(self, name: str, seen: Answer) -> None:
        limits = self._connection.limits
        if isinstance(seen, tuple) and len(seen[0]) <= _RAW_MAX:
            if len(limits) >= REMEMBERED and name not in limits:
                limits.clear()
            limits[name] = seen
        elif isinstance(seen, tuple):
            limits[name] = (b"", seen[1])  # Not ours: it is written over.
        else:
            limits.pop(name, None)


def _meter(raw: bytes) -> Meter | None:
    """Return the meter of an item. What is none of ours counts as nothing, and is written over."""
    try:
        level, stamp, limit, per = map(int, raw.split(b" "))
    except ValueError:
        return None
    sound = 0 < per < 2**63 and 0 <= level < 2**127 and 0 <= stamp < 2**63 and 0 < limit < 2**63
    return Meter(level, stamp, limit, per) if sound else None
