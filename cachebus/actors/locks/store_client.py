"""Clients through which the lock manager asks its store: on the spot, or through a guard over a connection."""

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

OWED_FOR = 60.0  # Seconds for which the store is asked to take a lock back.
AGAIN = 1.0  # Seconds between two such tries.
PATIENCE = 2.0  # Seconds for which the answer to such a try is waited for.
MOST_OWED = 10_000


class InlineLockClient:
    """Client of a store that never waits: `then` is called before `ask` returns, unless `then` itself calls `ask`."""

    def __init__(self, store: InlineLockStore) -> None:
        self._store = store
        self._waiting: deque[tuple[Request[Any], Then]] = deque()
        self._busy = False

    def ask(self, request: Request[Any], then: Then) -> None:
        """Have the store carry out a request, after those that were asked before."""
        # One after the other, not one within the other: a chain of waiters who are gone would fill the stack.
        self._waiting.append((request, then))
        self._work(lambda: None)

    def sweep(self) -> None:
        """Have the store take their locks from holders whose time is up."""
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
        """Carry these out, and no others."""
        for request in last:
            self.ask(request, lambda reply: None)


class LockStoreClient:
    """Client of a store that waits for its answers. A lone request leaves at once, and what comes while others are under
    way leaves with the next batch. The first request opens the store: a process without locks pays nothing for them.

    A release that the store did not carry out is answered, and asked again until the store is back, for `MOST_OWED` locks
    at most. Without that, the lock would be held until its lease ends.
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
        self._owed: list[tuple[ReleaseLock, float]] = []  # Releases to be asked again, with when to give up.
        self._collects = False
        self._is_open = False
        self._closed = False
        ctx.start_soon(self._pump)

    def __repr__(self) -> str:
        return f"<LockStoreClient of {self._store!r}, {len(self._owed)}/{MOST_OWED} releases pending>"

    def ask(self, request: Request[Any], then: Then) -> None:
        """Have the store carry out a request, after those that were asked before. Does not wait."""
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
        """The figures of the guard."""
        return msgspec.structs.asdict(self._guard.statistics())

    async def close(self, last: Sequence[Request[Any]]) -> None:
        """Carry these out if the store is open, and no others."""
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
                # Nothing comes between this look and the wait: nothing else runs on this loop.
                self._wake = open_port()
                await self._wake.wait()
                continue
            batch = [self._outbox.popleft() for _ in range(min(MAX_BATCH, len(self._outbox)))]
            replied = partial(_hand_over, batch)
            try:
                await self._guard.submit(self._target, [request for request, _ in batch], replied)
            except CacheError as error:
                replied([Failed.of(error)] * len(batch))
        while self._outbox:
            self._outbox.popleft()[1](Failed.of(CacheClosed("the lock manager was stopped")))

    def _opened(self) -> None:
        self._target, self._is_open = as_pipelined(self._store), True

    def _until_done(self, request: ReleaseLock, then: Then) -> Then:
        """Wrap `then`: it gets the reply, and the request is repeated if the reply is that of no store."""

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
            while self._owed:
                await self._ctx.clock.sleep_until(self._now() + AGAIN)
                if self._closed:
                    return
                await self._ask_again()
        finally:
            self._collects = False

    async def _ask_again(self) -> None:
        owed, self._owed = self._owed, []
        undone: list[tuple[ReleaseLock, float]] = []
        while owed and not undone:
            batch, owed = owed[:MAX_BATCH], owed[MAX_BATCH:]
            replies: Sequence[Reply] = [Failed.of(CacheTimeoutError())] * len(batch)
            # Past the guard: this goes on while the circuit is open, and says nothing about what callers would meet.
            with anyio.move_on_after(PATIENCE):
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
        # First those that were not asked for: of several servers one may be there.
        now = self._now()
        self._owed[:0] = [each for each in (*owed, *undone) if now < each[1]]


def _hand_over(batch: Sequence[tuple[Request[Any], Then]], replies: Sequence[Reply]) -> None:
    for (_, then), reply in zip(batch, replies, strict=True):
        then(reply)


def _is_undone(reply: Reply) -> bool:
    """Whether the store could not be asked, or did not say what it did."""
    return isinstance(reply, Failed) and (error_class(reply.code).transient or reply.code == CircuitOpen.code)
