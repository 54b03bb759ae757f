"""Compare-and-set updates: read an item, decide, and write the item only if it has not changed.

`update` implements the loop. A decider determines what is read and written: `KeyUpdates` for values and leases,
`LimitUpdates` for rate limits.
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
"""Maximum number of rounds before an update fails because others keep writing the key, in this batch or elsewhere."""

REMEMBERED = 10_000
"""Maximum number of rate limits that a connection remembers.

Above it, all are forgotten, at one round trip for each.
"""

_RAW_MAX = 100
"""Maximum size in bytes of the item of a rate limit."""


@dataclass(slots=True, eq=False)
class Draft:
    """A pending write of an item, and the replies to its requests by position, which apply if the write succeeds.

    A reply of `None` stands for `Stored` with the new version. `reply` is the reply to the latest request. If `tags`
    are set, for the value of a load, the write only counts if their generations are still current afterwards.
    """

    commands: list[bytes]
    reply: Reply | None
    tags: TagVersions = ()
    kind: type[Request[Any]] | None = None
    """The kind of requests that may join the write."""
    replies: dict[int, Reply | None] = field(default_factory=dict, init=False)


@dataclass(slots=True, eq=False)
class Item:
    """An item that requests of a round read and write.

    `draft` is the pending write. A request that may not join it waits for the next round, and so do all later ones
    (`closed`).
    """

    draft: Any = field(default=None, init=False)
    closed: bool = field(default=False, init=False)


class Decider(Protocol):
    """The decisions of one round of `update`."""

    unversioned: bool
    """True if the items do not depend on the generation of the namespace."""

    def lookup(self, waiting: list[tuple[int, Request[Any]]], replies: list[Any]) -> Exchange[list[tuple[int, Any]]]:
        """Read the items of requests. If a request is not valid, its reply is set in `replies`."""
        ...

    def decide(self, request: Any, item: Any) -> Reply | Draft | None:
        """Return the reply or the pending write, or `None` if the request may not join it. Raises `CacheError`."""
        ...

    def commands(self, items: list[Any]) -> list[list[bytes]]:
        """Return the write commands by item. Additional lists of commands may follow."""
        ...

    def outcomes(self, items: list[Any], answers: list[list[Answer]]) -> list[Reply | CacheError | None]:
        """Return the outcome by item: the reply for a written item, an error, or `None` if another client won."""
        ...


def update(
    make: Callable[[], Decider], session: Session, batch: Sequence[Request[Any]], replies: list[Any], waiting: list[int]
) -> Exchange[None]:
    """Execute the requests at the `waiting` positions together, in rounds of reading and writing.

    Each round has a new decider. If another client wins, the request is retried in the next round, up to `TRIES`
    rounds. Several writes of one key need one round each.
    """
    for _ in range(TRIES):
        if not waiting:
            return
        with contextlib.suppress(NamespaceChanged):
            waiting = yield from _round(make(), session, batch, replies, waiting)
    error = CacheBackendError(f"others wrote the key in between, {TRIES} times in a row; it was not changed", BACKEND)
    for position in waiting:
        replies[position] = Failed.of(error)


def _round(
    decider: Decider, session: Session, batch: Sequence[Request[Any]], replies: list[Any], waiting: list[int]
) -> Exchange[list[int]]:
    """Try the requests at these positions once, and return the positions to retry."""
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
    """Return the CAS token of a written item, an error, or `None` if another client was faster."""
    if isinstance(answer, int):
        return None if answer < 0 else answer
    return answer if isinstance(answer, CacheError) else unlike()


@dataclass(slots=True, eq=False)
class _Limit(Item):
    """A rate limit: the last known state with its CAS token, and the new state."""

    name: str
    before: GcraState | None
    token: int
    meter: GcraState | None
    reset: float = 0.0


class LimitUpdates:
    """The decider for rate limits. It uses the last known state and checks it in the same round trip.

    The state is usually the one that this connection has written last, so one round trip suffices. If another client
    has changed it meanwhile, the answer contains the new state for the next round.

    An item consists of four decimal numbers: level, Unix time of the server in microseconds, limit, and `per` in
    microseconds. It does not depend on the generation of the namespace, and expires when its level reaches 0.
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
            return cast("Reply", item.draft.reply)  # The decision was based on the current state.
        outcome = None if isinstance(seen, tuple) else outcome_of(seen)
        return unlike() if isinstance(outcome, int) else outcome

    def _remember(self, name: str, seen: Answer) -> None:
        limits = self._connection.limits
        if isinstance(seen, tuple) and len(seen[0]) <= _RAW_MAX:
            if len(limits) >= REMEMBERED and name not in limits:
                limits.clear()
            limits[name] = seen
        elif isinstance(seen, tuple):
            limits[name] = (b"", seen[1])  # Not a valid state, so it is overwritten.
        else:
            limits.pop(name, None)


def _meter(raw: bytes) -> GcraState | None:
    """Return the state of an item, or `None` if it is not valid, so that it is overwritten."""
    try:
        level, stamp, limit, per = map(int, raw.split(b" "))
    except ValueError:
        return None
    sound = 0 < per < 2**63 and 0 <= level < 2**127 and 0 <= stamp < 2**63 and 0 < limit < 2**63
    return GcraState(level, stamp, limit, per) if sound else None
