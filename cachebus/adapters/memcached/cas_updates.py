"""Compare-and-set updates: an item is read, a decision is made, and the item is written only if it still is what was read.

`update` is the one loop. A decider says what is read and what is to be written: `KeyUpdates` for values and leases,
`LimitUpdates` for rate limits, by the rule of `rates`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, cast

from cachebus.messages import Admit, CacheBackendError, CacheError, Failed, Reply, Request

from ..common.rate_limit import GcraState, admit, check_admit, microseconds
from .connection import Answer, Exchange, read, store, unlike
from .entry import TagVersions, server_expiry
from .errors import BACKEND
from .session import NamespaceChanged, Session
from .values import Values

TRIES = 100
"""How often a value is read and written back before others that write it all the time win, of this batch or not."""

REMEMBERED = 10_000
"""Limits of which a connection remembers what it saw; then it forgets all of them, at the cost of a round trip for each."""

_RAW_MAX = 100
"""Bytes of an item of ours, at most."""


@dataclass(slots=True, eq=False)
class Draft:
    """A write over an item, and the replies to the requests that wanted it, by position. They hold if it is written; `None`
    is `Stored`, at its version. `reply` is that to the latest request. What is stored for a load under `tags` only holds if
    their generations are the present ones even after."""

    commands: list[bytes]
    reply: Reply | None
    tags: TagVersions = ()
    kind: type[Request[Any]] | None = None
    """The requests that may join it."""
    replies: dict[int, Reply | None] = field(default_factory=dict, init=False)


@dataclass(slots=True, eq=False)
class Item:
    """An item that requests of a round want to write. `draft` is what was decided. A request that may not join it waits for
    the next round, and so do all after it (`closed`)."""

    draft: Any = field(default=None, init=False)
    closed: bool = field(default=False, init=False)


class Decider(Protocol):
    """What one round of `update` reads and writes."""

    unversioned: bool
    """Whether its items stand outside the generations of the namespace."""

    def lookup(self, waiting: list[tuple[int, Request[Any]]], replies: list[Any]) -> Exchange[list[tuple[int, Any]]]:
        """Read the items of requests. A request that has none is answered in `replies`."""
        ...

    def decide(self, request: Any, item: Any) -> Reply | Draft | None:
        """Return the reply, or what to write; `None` if it may not join the item's draft. Raises `CacheError`."""
        ...

    def commands(self, items: list[Any]) -> list[list[bytes]]:
        """Return the commands that write what was decided, by item; more may follow, to be sent after them."""
        ...

    def outcomes(self, items: list[Any], answers: list[list[Answer]]) -> list[Reply | CacheError | None]:
        """Return, by item, the reply that stands for `None` if it was written, or the error; `None` if others were faster."""
        ...


def update(
    make: Callable[[], Decider], session: Session, batch: Sequence[Request[Any]], replies: list[Any], waiting: list[int]
) -> Exchange[None]:
    """Carry out the requests at the `waiting` positions together, in rounds of reading and writing, each with a decider.

    Requests that are outrun are tried again in the next round, up to `TRIES`. Several writes of one key take a round each.
    """
    for _ in range(TRIES):
        if not waiting:
            return
        with contextlib.suppress(NamespaceChanged):
            waiting = yield from _round(make(), session, batch, replies, waiting)
    error = CacheBackendError(f"others wrote the key in between, {TRIES} times in a row; nothing was done", BACKEND)
    for position in waiting:
        replies[position] = Failed.of(error)


def _round(
    decider: Decider, session: Session, batch: Sequence[Request[Any]], replies: list[Any], waiting: list[int]
) -> Exchange[list[int]]:
    """Try the requests at these positions once, and return those that have to be tried again."""
    keyed = yield from decider.lookup([(position, batch[position]) for position in waiting], replies)
    again: list[int] = []
    for position, item in keyed:
        try:
            decision = None if item.closed else decider.decide(batch[position], item)
        except CacheError as error:
            replies[position] = Failed.of(error)
            continue
        if decision is None:
            item.closed = True
            again.append(position)
        elif isinstance(decision, Draft):
            item.draft = decision
            decision.replies[position] = decision.reply
        else:
            replies[position] = decision
    items = list({id(item): item for _, item in keyed if item.draft is not None}.values())
    if not items:
        return again
    written = decider.commands(items)
    session.writing = True
    try:
        commands = [command for each in written for command in each]
        flat = iter((yield from session.ask(commands, unversioned=decider.unversioned)))
    except NamespaceChanged:
        return sorted(again + [position for item in items for position in item.draft.replies])
    session.writing = False
    outcomes = decider.outcomes(items, [list(islice(flat, len(each))) for each in written])
    for item, outcome in zip(items, outcomes, strict=True):
        for position, reply in item.draft.replies.items():
            if outcome is None:
                again.append(position)
            else:
                replies[position] = Failed.of(outcome) if isinstance(outcome, CacheError) else reply or outcome
    return sorted(again)


def outcome_of(answer: Answer) -> int | CacheError | None:
    """Return the token of an item that was written, the error, or `None` if others were faster."""
    if isinstance(answer, int):
        return None if answer < 0 else answer
    return answer if isinstance(answer, CacheError) else unlike()


@dataclass(slots=True, eq=False)
class _Limit(Item):
    """A limit: what we take to be there, under its CAS token, and what is to be."""

    name: str
    before: GcraState | None
    token: int
    meter: GcraState | None
    reset: float = 0.0


class LimitUpdates:
    """Decides by what was last seen of a limit, and finds out in the same round trip whether that still stands.

    What is under a limit's name is mostly what this connection has written there last, so one round trip is all it takes.
    If another client was there meanwhile, the next one knows already what it needs to know.

    An item is four decimal numbers: level, Unix time of the server in microseconds, limit, and the microseconds of `per`.
    It stands outside of the generations of the namespace, and goes when its level is at 0.
    """

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


def _meter(raw: bytes) -> GcraState | None:
    """Return the meter of an item. What is none of ours counts as nothing, and is written over."""
    try:
        level, stamp, limit, per = map(int, raw.split(b" "))
    except ValueError:
        return None
    sound = 0 < per < 2**63 and 0 <= level < 2**127 and 0 <= stamp < 2**63 and 0 < limit < 2**63
    return GcraState(level, stamp, limit, per) if sound else None
