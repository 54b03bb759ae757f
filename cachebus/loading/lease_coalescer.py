"""Coalescing of lease requests: concurrent callers of this process share one request per key.

A reply is valid only for callers that arrived before the request was sent; for later ones it may be out of date.
Callers that arrive while a request is in flight share the next one, which is sent after the current reply. So each key
has at most two requests: one in flight and one pending. Tasks that an event loop wakes together share a request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from .leased_load import LeasedLoad, LoadJob
from .runners import Runner
from .singleflight import CANCELLED, InFlightLoad, Raised, Value


class _SharedRequest(Struct, eq=False):
    """Lease request shared by several callers. `sent` is true once the request is in flight."""

    answer: InFlightLoad
    next: _SharedRequest | None = None
    sent: bool = False


class LeaseCoalescer:
    """Coalescer that lets concurrent callers of one cache share lease requests."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._requests: dict[str, _SharedRequest] = {}

    async def ask(self, runner: Runner, job: LoadJob, make: Callable[[], LeasedLoad]) -> tuple[Any, LeasedLoad | None]:
        """Return the reply to a lease request that is sent after this call begins.

        Also returns the load that sent the request, if this caller created it with `make`; otherwise `None`.
        """
        while True:
            mine, before, is_leader = self._enter(job)
            if not is_leader:
                outcome = await runner.wait(mine.answer)
                if isinstance(outcome, Raised):
                    raise outcome.error
                if isinstance(outcome, Value):
                    return outcome.value, None
                continue  # The caller that had to send the request was cancelled.
            outcome = CANCELLED
            try:
                if before is not None:
                    await runner.wait(before.answer)
                else:
                    await runner.let_others_run()
                with self._guard:
                    self._requests[job.key] = mine
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

    def _enter(self, job: LoadJob) -> tuple[_SharedRequest, _SharedRequest | None, bool]:
        """Return the request to join, the one to wait for before sending it, and whether this caller has to send it."""
        with self._guard:
            current = self._requests.get(job.key)
            if current is not None and _is_over(current):
                current = None
            if current is None:
                mine = self._requests[job.key] = _SharedRequest(InFlightLoad(owner=job.caller))
                return mine, None, True
            if not current.sent:
                return current, None, False
            if current.next is None or _is_over(current.next):
                current.next = _SharedRequest(InFlightLoad(owner=job.caller))
                return current.next, current, True
            return current.next, None, False

    def _end(self, key: str, mine: _SharedRequest, before: _SharedRequest | None) -> None:
        with self._guard:
            if self._requests.get(key) is mine:
                if mine.next is None:
                    del self._requests[key]
            elif before is not None and before.next is mine:
                # Cancelled before its request was sent, so the next caller starts another one.
                before.next = None
                if before.answer.resolved and self._requests.get(key) is before:
                    del self._requests[key]


def _is_over(current: _SharedRequest) -> bool:
    """Return True if the sender was interrupted, after waking its waiters, which ask again."""
    if not current.answer.is_orphan():
        return False
    current.answer.resolve(CANCELLED)
    return True
