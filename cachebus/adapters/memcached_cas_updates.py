"""Compare-and-set updates: an item is read, a decision is made, and the item is written only if it still is what was read.

`update` is the one loop. A decider says what is read and what is to be written: `KeyUpdates` for values and leases,
`LimitUpdates` for rate limits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

from cachebus.messages import CacheBackendError, CacheError, Failed, Reply, Request

from .memcached_connection import Answer, Exchange, unlike
from .memcached_entry import TagVersions
from .memcached_errors import BACKEND
from .memcached_session import NamespaceChanged, Session

TRIES = 100
"""How often a value is read and written back before others that write it all the time win, of this batch or not."""


@dataclass(slots=True, eq=False)
class Draft:
    """What is to be written over an item, and the replies to the requests that wanted it, by position. They hold if it is
    written; `None` is `Stored`, at the version that it gets. `reply` is that to the latest request. What is stored for a
    load under `tags` only holds if their generations are the present ones even after."""

    commands: list[bytes]
    reply: Reply | None
    tags: TagVersions = ()
    kind: type[Request[Any]] | None = None
    """The requests that may join it."""
    replies: dict[int, Reply | None] = field(default_factory=dict, init=False)


@dataclass(slots=True, eq=False)
class Item:
    """An item that requests of a round want to write. `draft` is what was decided; a request that may not join it waits for
    the next round, and so do all after it (`closed`), so that their order holds."""

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
        """Return the reply, or what is to be written for it; `None` if it may not join what was decided for the item in
        this round. Raises `CacheError`."""
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

    Requests that are outrun are tried again in the next round. Several writes of one key take a round each. The number of
    rounds is bounded, so that the rest of the batch does not wait for too long.
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
