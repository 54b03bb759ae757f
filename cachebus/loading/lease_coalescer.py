"""Lease requests sent together: one question to the backend for all callers of this process who ask about a key at the same time.

An answer is valid only for callers who asked before the question was sent: for a later one it may be out of date. So callers
who come while a question is on its way belong to the next round, which begins when this one has ended. However many ask, there
are two questions: one on its way, and one to come. Tasks that an event loop wakes together share a round.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from .leased_load import LeasedLoad, LoadJob
from .runners import Runner
from .singleflight import CANCELLED, InFlightLoad, Raised, Value


class _Round(Struct, eq=False):
    """The callers that share one question. `sent` says that the question is on its way."""

    answer: InFlightLoad
    next: _Round | None = None
    sent: bool = False


class LeaseCoalescer:
    """The rounds of one cache that are under way, by key."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._rounds: dict[str, _Round] = {}

    async def ask(self, runner: Runner, job: LoadJob, make: Callable[[], LeasedLoad]) -> tuple[Any, LeasedLoad | None]:
        """Return the reply to a question for the lease that was sent after this call began, and the load that asked it if that
        was made by this caller."""
        while True:
            mine, before, asks = self._enter(job)
            if not asks:
                outcome = await runner.wait(mine.answer)
                if isinstance(outcome, Raised):
                    raise outcome.error
                if isinstance(outcome, Value):
                    return outcome.value, None
                continue  # The caller who was to ask has gone.
            outcome = CANCELLED
            try:
                if before is not None:
                    await runner.wait(before.answer)
                else:
                    await runner.let_others_run()
                with self._guard:
                    self._rounds[job.key] = mine
                    mine.sent = True
                load = make()
                reply = await load.ask()
                outcome = Value(reply)
                return reply, load
            except Exception as error:
                outcome = Raised(error)
                raise
            finally:
                self._end(job.key, mine, before)
                mine.answer.resolve(outcome)

    def _enter(self, job: LoadJob) -> tuple[_Round, _Round | None, bool]:
        """Return the round of a caller who comes now, the round before it, and whether this caller asks for its round."""
        with self._guard:
            current = self._rounds.get(job.key)
            if current is not None and _is_over(current):
                current = None
            if current is None:
                mine = self._rounds[job.key] = _Round(InFlightLoad(owner=job.caller))
                return mine, None, True
            if not current.sent:
                return current, None, False
            if current.next is None or _is_over(current.next):
                current.next = _Round(InFlightLoad(owner=job.caller))
                return current.next, current, True
            return current.next, None, False

    def _end(self, key: str, mine: _Round, before: _Round | None) -> None:
        with self._guard:
            if self._rounds.get(key) is mine:
                if mine.next is None:
                    del self._rounds[key]
            elif before is not None and before.next is mine:
                # Gone before its question was sent: a caller who comes now begins another round.
                before.next = None
                if before.answer.resolved and self._rounds.get(key) is before:
                    del self._rounds[key]


def _is_over(current: _Round) -> bool:
    """Return whether the caller who was to ask was interrupted, and let those ask again who wait for the answer."""
    if not current.answer.is_orphan():
        return False
    current.answer.resolve(CANCELLED)
    return True
