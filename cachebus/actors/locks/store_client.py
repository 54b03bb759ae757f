"""Clients of lock stores for the lock manager: one for inline stores, and one for stores that wait for I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import anyio
import msgspec

from cachebus.bus import TaskPort, open_port
from cachebus.messages import (
    CacheClosed,
    CacheError,
    CacheTimeoutError,
    CircuitOpen,
    Failed,
    LockReleased,
    Released,
    ReleaseLock,
    Reply,
    Request,
    error_class,
)

from ..guard.guard import AwaitedStore, Guard, LazyStore, as_pipelined
from ..guard.policy import GuardPolicy
from ..ports import BatchStore, InlineLockStore, PipelinedStore
from ..runtime.actor import Context

Then = Callable[[Reply], None]  # Takes the reply; an error is a `Failed`.
MAX_BATCH = 128

RETRY_FOR = 60.0  # Seconds for which a failed release is retried.
RETRY_INTERVAL = 1.0  # Seconds between two retries.
RETRY_TIMEOUT = 2.0  # Seconds to wait for the reply to a retry.
MAX_PENDING = 10_000  # Maximum number of releases to retry.


class InlineLockClient:
    """Client of a store that never waits: `then` is called before `ask` returns, unless `then` itself calls `ask`."""

    def __init__(self, store: InlineLockStore) -> None:
        self._store = store
        self._waiting: deque[tuple[Request[Any], Then]] = deque()
        self._busy = False

    def ask(self, request: Request[Any], then: Then) -> None:
        """Execute a request in the store, after those that were passed earlier."""
        # In a loop instead of recursion: a long chain of waiters that have left would overflow the stack.
        self._waiting.append((request, then))
        self._work(lambda: None)

    def sweep(self) -> None:
        """Release the locks whose leases have expired."""
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

    async def close(self, last: Sequence[Request[Any]]) -> None:
        """Execute the requests in `last`."""
        for request in last:
            self.ask(request, lambda reply: None)


class LockStoreClient:
    """Client of a store that waits for I/O.

    A single request is sent immediately. Requests that arrive while others are in flight are sent with the next
    batch. The first request opens the store, so a process that uses no locks does not connect.

    If the store did not execute a release, the caller gets a reply and the release is retried until the store is
    back. At most `MAX_PENDING` releases are retried. Without a retry, the lock would be held until its lease ends.
    """

    def __init__(self, store: BatchStore, policy: GuardPolicy, ctx: Context) -> None:
        self._store = store
        self._ctx = ctx
        self._now = ctx.clock.monotonic
        self._lazy = LazyStore(store, self._opened)
        self._target: PipelinedStore | AwaitedStore | LazyStore = self._lazy
        self._guard = Guard(policy, ctx, store.name)
        self._outbox: deque[tuple[Request[Any], Then]] = deque()
        self._wake: TaskPort | None = None
        self._pending: list[tuple[ReleaseLock, float]] = []  # Releases to retry, each with the time to give up.
        self._retrying = False
        self._is_open = False
        self._closed = False
        ctx.start_soon(self._pump)

    def __repr__(self) -> str:
        return f"<LockStoreClient of {self._store!r}, {len(self._pending)}/{MAX_PENDING} releases pending>"

    def ask(self, request: Request[Any], then: Then) -> None:
        """Execute a request in the store, after those that were passed earlier. Does not wait."""
        if type(request) is ReleaseLock and not request.unclaimed:
            then = self._until_done(request, then)
        if not self._outbox:
            try:
                if self._guard.try_submit(self._target, (request,), lambda replies: then(replies[0])):
                    return
            except CacheError as error:
                then(Failed.of(error))
                return
        self._outbox.append((request, then))
        self._wake_up()

    def statistics(self) -> dict[str, Any]:
        """Return the statistics of the guard."""
        return msgspec.structs.asdict(self._guard.statistics())

    async def close(self, last: Sequence[Request[Any]]) -> None:
        """Execute the requests in `last` if the store is open, reject all others, and close the store."""
        self._closed = self._guard.closed = True
        self._wake_up()
        try:
            if last and self._is_open:
                await self._store.execute(last)
        finally:
            await self._store.close()

    def _wake_up(self) -> None:
        if self._wake is not None:
            self._wake.answer(None)

    async def _pump(self) -> None:
        while not self._closed:
            if not self._outbox:
                # No request can arrive between the check and the wait, because no other task runs in between.
                self._wake = open_port()
                await self._wake.wait()
                continue
            batch = [self._outbox.popleft() for _ in range(min(MAX_BATCH, len(self._outbox)))]
            replied = partial(_deliver, batch)
            try:
                await self._guard.submit(self._target, [request for request, _ in batch], replied)
            except CacheError as error:
                replied([Failed.of(error)] * len(batch))
        while self._outbox:
            self._outbox.popleft()[1](Failed.of(CacheClosed("the lock manager was stopped")))

    def _opened(self) -> None:
        self._target, self._is_open = as_pipelined(self._store), True

    def _until_done(self, request: ReleaseLock, then: Then) -> Then:
        """Wrap `then` so that the release is retried if the store did not execute it."""

        def replied(reply: Reply) -> None:
            if _is_undone(reply) and len(self._pending) < MAX_PENDING:
                self._pending.append((request, self._now() + RETRY_FOR))
                if not self._retrying:
                    self._retrying = True
                    self._ctx.start_soon(self._retry_releases)
            then(reply)

        return replied

    async def _retry_releases(self) -> None:
        try:
            while self._pending:
                await self._ctx.clock.sleep_until(self._now() + RETRY_INTERVAL)
                if self._closed:
                    return
                await self._retry_once()
        finally:
            self._retrying = False

    async def _retry_once(self) -> None:
        pending, self._pending = self._pending, []
        undone: list[tuple[ReleaseLock, float]] = []
        while pending and not undone:
            batch, pending = pending[:MAX_BATCH], pending[MAX_BATCH:]
            replies: Sequence[Reply] = [Failed.of(CacheTimeoutError())] * len(batch)
            # Bypass the guard: retries continue while the circuit is open and do not count for it.
            with anyio.move_on_after(RETRY_TIMEOUT):
                try:
                    replies = await self._lazy.execute([request for request, _ in batch])
                except CacheError as error:
                    replies = [Failed.of(error)] * len(batch)
            for each, reply in zip(batch, replies, strict=True):
                request = each[0]
                if isinstance(reply, Released) and request.token:
                    self._ctx.emit(LockReleased, request.name, request.owner, request.token)
                elif _is_undone(reply):
                    undone.append(each)
        # Untried releases come first: if there are several servers, another one may be available.
        now = self._now()
        self._pending[:0] = [each for each in (*pending, *undone) if now < each[1]]


def _deliver(batch: Sequence[tuple[Request[Any], Then]], replies: Sequence[Reply]) -> None:
    for (_, then), reply in zip(batch, replies, strict=True):
        then(reply)


def _is_undone(reply: Reply) -> bool:
    """True if the store was not reached or its result is unknown."""
    return isinstance(reply, Failed) and (error_class(reply.code).transient or reply.code == CircuitOpen.code)
