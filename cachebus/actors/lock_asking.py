"""How the lock manager asks its store: on the spot, or through a guard over a connection."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from cachebus.bus import TaskPort, open_port
from cachebus.messages import CacheClosed, CacheError, Failed, ReleaseLock, Reply, Request

from .context import Context
from .guard_policy import GuardPolicy
from .lazy_store import LazyStore
from .lock_debts import MAX_BATCH, Debts, Then
from .ports import BatchStore, InlineLockStore, PipelinedStore
from .resilience import AwaitedStore, Guard


class Asking(Protocol):
    """A way to ask, which never waits."""

    def ask(self, request: Request[Any], then: Then) -> None:
        """Have the store carry out a request. What is asked first is done first."""

    def sweep(self) -> None:
        """Have the store take their locks from holders whose time is up, where it does so only if it is asked."""

    def statistics(self) -> dict[str, Any]:
        """What the guard has seen; empty where there is none."""
        ...

    async def close(self, last: Sequence[Request[Any]]) -> None:
        """Ask nothing any more, but for these."""


class AskingInline:
    """Over a store that never waits: `then` is called before `ask` returns, unless that is called from within it."""

    def __init__(self, store: InlineLockStore) -> None:
        self._store = store
        self._waiting: deque[tuple[Request[Any], Then]] = deque()
        self._busy = False

    def ask(self, request: Request[Any], then: Then) -> None:
        """As `Asking.ask`."""
        # One after the other, and not one within the other: a chain of waiters who are gone would fill the stack.
        self._waiting.append((request, then))
        self._work(lambda: None)

    def sweep(self) -> None:
        """As `Asking.sweep`."""
        self._work(self._store.sweep)

    def _work(self, first: Callable[[], None]) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            first()
            while self._waiting:
                request, then = self._waiting.popleft()
                try:
                    reply = self._store.decide(request)
                except CacheError as error:
                    reply = Failed.of(error)
                then(reply)
        finally:
            self._busy = False

    def statistics(self) -> dict[str, Any]:
        """As `Asking.statistics`."""
        return {}

    async def close(self, last: Sequence[Request[Any]]) -> None:
        """As `Asking.close`."""
        for request in last:
            self.ask(request, lambda reply: None)


class AskingBatches:
    """Over a store that waits for its answers: a lone request leaves at once, what comes while others are under way leaves
    with the next batch. The store is opened by the first request, so that locks cost nothing where nobody uses them."""

    def __init__(self, store: BatchStore, policy: GuardPolicy, ctx: Context) -> None:
        self._store = store
        lazy: Any = LazyStore(store, self._opened)
        self._asked = self._way_to(lazy)
        self._debts = Debts(lazy, ctx)
        self._guard = Guard(policy, ctx, store.name)
        self._outbox: deque[tuple[Request[Any], Then]] = deque()
        self._wake: TaskPort | None = None
        self._is_open = False
        self._closed = False
        ctx.start_soon(self._pump)

    def ask(self, request: Request[Any], then: Then) -> None:
        """As `Asking.ask`."""
        if type(request) is ReleaseLock and not request.unclaimed:
            then = self._debts.unless_done(request, then)
        if not self._outbox:
            try:
                if self._guard.try_submit(self._asked, (request,), lambda replies: then(replies[0])):
                    return
            except CacheError as error:
                then(Failed.of(error))
                return
        self._outbox.append((request, then))
        if self._wake is not None:
            self._wake.answer(None)

    def sweep(self) -> None:
        """As `Asking.sweep`: a server does so by itself."""

    def statistics(self) -> dict[str, Any]:
        """As `Asking.statistics`."""
        return msgspec.structs.asdict(self._guard.statistics())

    async def close(self, last: Sequence[Request[Any]]) -> None:
        """As `Asking.close`."""
        self._closed = True
        self._guard.close()
        self._debts.close()
        if self._wake is not None:
            self._wake.answer(None)
        try:
            if last and self._is_open:
                await self._store.execute(last)
        finally:
            await self._store.close()

    async def _pump(self) -> None:
        while not self._closed:
            if not self._outbox:
                # Nothing comes between this look and the wait: nobody else runs on this loop.
                self._wake = open_port()
                await self._wake.wait()
                continue
            batch = [self._outbox.popleft() for _ in range(min(MAX_BATCH, len(self._outbox)))]
            await self._send(batch)
        while self._outbox:
            self._outbox.popleft()[1](Failed.of(CacheClosed("the lock manager was stopped")))

    async def _send(self, batch: Sequence[tuple[Request[Any], Then]]) -> None:
        requests = [request for request, _ in batch]

        def replied(replies: Sequence[Reply]) -> None:
            for (_, then), reply in zip(batch, replies, strict=True):
                then(reply)

        try:
            await self._guard.submit(self._asked, requests, replied)
        except CacheError as error:
            replied([Failed.of(error)] * len(batch))

    def _opened(self) -> None:
        self._asked, self._is_open = self._way_to(self._store), True

    def _way_to(self, store: Any) -> PipelinedStore | AwaitedStore:
        return store if isinstance(self._store, PipelinedStore) else AwaitedStore(store)
