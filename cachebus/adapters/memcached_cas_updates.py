"""Compare-and-set updates: an item is read, a decision is made, and the item is written only if it still is what was read.

`CasUpdate` is the one loop. A decider says what is read and what is to be written: `KeyUpdates` for values and leases,
`LimitUpdates` for rate limits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, TypeVar

from cachebus.messages import CacheBackendError, CacheError, Failed, Reply, Request

from .memcached_connection import Answer, Exchange, unlike
from .memcached_errors import BACKEND
from .memcached_session import NamespaceChanged, Session

TRIES = 100
"""How often a value is read and written back before others that write it all the time win, of this batch or not."""


@dataclass(slots=True, eq=False)
class Draft:
    """What is to be written over an item, and the replies to the requests that wanted it, by position. They hold if it is
    written; `None` is `Stored`, at the version that it gets. `reply` is that to the latest request."""

    commands: list[bytes]
    reply: Reply | None
    replies: dict[int, Reply | None] = field(default_factory=dict, init=False)


@dataclass(slots=True, eq=False)
class Item:
    """An item that requests of a round want to write. `draft` is what was decided; a request that may not join it waits for
    the next round, and so do all after it (`closed`), so that their order holds."""

    draft: Any = field(default=None, init=False)
    closed: bool = field(default=False, init=False)


AnyItem = TypeVar("AnyItem", bound=Item)


class Decider(Protocol[AnyItem]):
    """What `CasUpdate` reads and writes. One round has one lookup."""

    session: Session
    unversioned: bool
    """Whether its items stand outside the generations of the namespace."""

    def lookup(
        self, waiting: list[tuple[int, Request[Any]]], replies: list[Any]
    ) -> Exchange[list[tuple[int, AnyItem]]]:
        """Read the items of requests. A request that has none is answered in `replies`."""
        ...

    def decide(self, request: Request[Any], item: AnyItem) -> Reply | Draft | None:
        """Return the reply, or what is to be written for it; `None` if it may not join what was decided for the item in
        this round. Raises `CacheError`."""
        ...

    def commands(self, items: list[AnyItem]) -> list[list[bytes]]:
        """Return the commands that write what was decided, by item; more may follow, to be sent after them."""
        ...

    def outcomes(self, items: list[AnyItem], answers: list[list[Answer]]) -> list[Reply | CacheError | None]:
        """Return, by item, the reply that stands for `None` if it was written, or the error; `None` if others were faster."""
        ...


class CasUpdate:
    """Carries out the requests of a run together, in rounds of reading and writing."""

    def __init__(self, decider: Decider[Any], batch: Sequence[Request[Any]], replies: list[Any]) -> None:
        self._decider = decider
        self._session = decider.session
        self._batch = batch
        self._replies = replies

    def run(self, first: int, end: int) -> Exchange[None]:
        """Carry out the requests from `first` to before `end`. Those that are outrun are tried again in the next round.

        Several writes of one key take a round each. Their number is bounded, so that the rest of the batch does not
        wait for too long.
        """
        waiting = list(range(first, end))
        for _ in range(TRIES):
            if not waiting:
                return
            with contextlib.suppress(NamespaceChanged):
                waiting = yield from self._round(waiting)
        error = CacheBackendError(f"others wrote the key in between, {TRIES} times in a row; nothing was done", BACKEND)
        for position in waiting:
            self._replies[position] = Failed.of(error)

    def _round(self, waiting: list[int]) -> Exchange[list[int]]:
        """Try the requests at these positions once, and return those that have to be tried again."""
        decider = self._decider
        keyed = yield from decider.lookup([(position, self._batch[position]) for position in waiting], self._replies)
        again: list[int] = []
        for position, item in keyed:
            request = self._batch[position]
            try:
                decision = None if item.closed else decider.decide(request, item)
            except CacheError as error:
                self._replies[position] = Failed.of(error)
                continue
            if decision is None:
                item.closed = True
                again.append(position)
            elif isinstance(decision, Draft):
                item.draft = decision
                decision.replies[position] = decision.reply
            else:
                self._replies[position] = decision
        writing = list({id(item): item for _, item in keyed if item.draft is not None}.values())
        if writing:
            again += yield from self._write(writing)
        return sorted(again)

    def _write(self, items: list[Item]) -> Exchange[list[int]]:
        """Write what was decided, and return the positions of requests that were outrun."""
        decider, session = self._decider, self._session
        written = decider.commands(items)
        session.writing = True
        try:
            flat = yield from session.ask(
                [command for each in written for command in each], unversioned=decider.unversioned
            )
        except NamespaceChanged:
            return [position for item in items for position in item.draft.replies]
        session.writing = False
        answers = iter(flat)
        outcomes = decider.outcomes(items, [list(islice(answers, len(each))) for each in written])
        again: list[int] = []
        for item, outcome in zip(items, outcomes, strict=True):
            for position, reply in item.draft.replies.items():
                if outcome is None:
                    again.append(position)
                elif isinstance(outcome, CacheError):
                    self._replies[position] = Failed.of(outcome)
                else:
                    self._replies[position] = reply or outcome
        return again


def outcome_of(answer: Answer) -> int | CacheError | None:
    """Return the token of an item that was written, the error, or `None` if others were faster."""
    if isinstance(answer, int):
        return None if answer < 0 else answer
    return answer if isinstance(answer, CacheError) else unlike()
