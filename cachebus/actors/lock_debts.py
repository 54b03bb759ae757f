"""Locks that are given back while their store is away: whoever gives one back is told so, and the store is asked again until it
is there. Nobody else would, and the lock would be held by nobody until its lease ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio

from cachebus.messages import (
    CacheError,
    CacheTimeoutError,
    CircuitOpen,
    Failed,
    LockReleased,
    Released,
    ReleaseLock,
    Reply,
    error_class,
)

from .context import Context
from .ports import BatchStore

Then = Callable[[Reply], None]
"""Told the reply; an error is a `Failed`."""

MAX_BATCH = 128

OWED_FOR = 60.0
"""Seconds for which the store is asked to take a lock back."""

AGAIN = 1.0
"""Seconds between two such tries."""

PATIENCE = 2.0
"""Seconds for which the answer to such a try is waited for."""

MOST_OWED = 10_000


class Debts:
    """What a store was to take back and did not, `MOST_OWED` locks at most. `ctx` is that of the manager."""

    def __init__(self, store: BatchStore, ctx: Context) -> None:
        self._store = store
        self._ctx = ctx
        self._now = ctx.clock.monotonic
        self._owed: list[tuple[ReleaseLock, float]] = []  # With when to ask no longer.
        self._collects = False
        self._closed = False

    def __repr__(self) -> str:
        return f"<Debts {len(self._owed)}/{MOST_OWED}>"

    def close(self) -> None:
        """Ask no more."""
        self._closed = True

    def unless_done(self, request: ReleaseLock, then: Then) -> Then:
        """What is to be told the reply to a request: `then` is, and the request is owed if the reply is that of no store."""

        def replied(reply: Reply) -> None:
            if _is_undone(reply) and len(self._owed) < MOST_OWED:
                self._owed.append((request, self._now() + OWED_FOR))
                if not self._collects:
                    self._collects = True
                    self._ctx.start_soon(self._collect)
            then(reply)

        return replied

    async def _collect(self) -> None:
        try:
            await self._ask_again()
        finally:
            self._collects = False

    async def _ask_again(self) -> None:
        while self._owed:
            await self._ctx.clock.sleep_until(self._now() + AGAIN)
            if self._closed:
                return
            owed, self._owed = self._owed, []
            undone: list[tuple[ReleaseLock, float]] = []
            while owed and not undone:
                batch, owed = owed[:MAX_BATCH], owed[MAX_BATCH:]
                for each, reply in zip(batch, await self._repeated([request for request, _ in batch]), strict=True):
                    request = each[0]
                    if isinstance(reply, Released) and request.token:
                        self._ctx.tell(LockReleased, request.name, request.owner, request.token)
                    elif _is_undone(reply):
                        undone.append(each)
            # First those that were not asked for: of several servers one may be there.
            now = self._now()
            self._owed[:0] = [each for each in (*owed, *undone) if now < each[1]]

    async def _repeated(self, batch: Sequence[ReleaseLock]) -> Sequence[Reply]:
        # Past the guard: this goes on while the circuit is open, and says nothing about what callers would meet.
        replies: Sequence[Reply] = [Failed.of(CacheTimeoutError())] * len(batch)
        with anyio.move_on_after(PATIENCE):
            try:
                replies = await self._store.execute(batch)
            except CacheError as error:
                replies = [Failed.of(error)] * len(batch)
        return replies


def _is_undone(reply: Reply) -> bool:
    """Whether the store could not be asked, or did not say what it did."""
    return isinstance(reply, Failed) and (error_class(reply.code).transient or reply.code == CircuitOpen.code)
