"""The actor that gives out locks: it keeps the callers that wait, in the order in which they came.

The store decides who holds a lock, in one step each time. The manager asks it for one caller, and again when something
may have changed: the store says so, a lease ends, a connection came back. An `AcquireLock` may be asked any number of
times, so asking once more does no harm.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from threading import get_ident
from typing import Any

from cachebus.bus import DeferredReply
from cachebus.messages import (
    AcquireLock,
    CacheError,
    Deleted,
    Describe,
    DescribeLock,
    Description,
    Failed,
    LockAcquired,
    LockDenied,
    LockExpired,
    LockGranted,
    LockQueued,
    LockReleased,
    Overloaded,
    Released,
    ReleaseLock,
    Reply,
    Request,
    Snapshot,
    Sweep,
    TakeSnapshot,
    error_class,
)

from ..guard.attempts import LOCK_REQUESTS
from ..guard.policy import GuardPolicy
from ..ports import BatchStore, InlineLockStore, LockStore, Timer, TimerQueue
from ..runtime.actor import Actor, Handlers
from .queue import LockQueue, LockReply, Waiter, check_lock_request
from .store_client import InlineLockClient, LockStoreClient

PARKED = 10.0  # Seconds after which a waiting caller has to ask again, which shows that it is alive.
KEPT = 5.0  # Seconds for which the place of such a caller is kept.
AGAIN = 1.0  # Seconds after which a store that failed is asked again for the waiters.
SLACK = 0.001  # Seconds after the end of a lease at which its store surely knows of it.
POLL_MAX = 12  # The longest pause between two questions to a store without a queue, as a multiple of the shortest one.


class LockManager(Actor):
    """Actor before a `LockStore`. At most `max_waiters` callers wait for locks, or for the store to answer. `shared`: it is
    one of several at its address, and a caller may ask another one the next time."""

    def __init__(
        self,
        store: LockStore,
        guard: GuardPolicy | None = None,
        *,
        max_waiters: int = 10_000,
        shared: bool = False,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._policy = guard or GuardPolicy()
        self._max_waiters = max_waiters
        self._shared = shared
        self._draw = draw
        self._client: InlineLockClient | LockStoreClient
        self._inline = store if isinstance(store, InlineLockStore) else None
        self._waiters: dict[tuple[str, str], Waiter] = {}  # By the names of their locks and their tickets.
        self._queues: dict[str, LockQueue] = {}
        self._due: TimerQueue[tuple[str, str]] = TimerQueue()  # Of locks, without a ticket, and of waiters.
        self._sweeps_at = math.inf
        self._sweep_timer: Timer | None = None
        self._thread = 0

    def __repr__(self) -> str:
        return f"<LockManager over {self._store!r}, {len(self._waiters)}/{self._max_waiters} waiting>"

    async def on_start(self) -> None:
        self._thread = get_ident()
        if self._inline is not None:
            self._client = InlineLockClient(self._inline)
        else:
            assert isinstance(self._store, BatchStore)
            self._client = LockStoreClient(self._store, self._policy, self.ctx)
        self._store.listener = self

    async def on_stop(self) -> None:
        places = [each.abandoned(unclaimed=True) for each in self._waiters.values()]
        for each in self._waiters.values():
            each.give(LockQueued("", 0.0))  # Another manager may serve the same store.
        self._waiters.clear()
        self._queues.clear()
        await self._client.close(places)

    def repair(self) -> None:
        # Then a new incarnation begins: waiting callers are asked to come again, and the store knows their places.
        if self._inline is not None:
            self._inline.repair()

    def handlers(self) -> Handlers:
        table = super().handlers()
        if self._inline is not None:
            table.plain.update(dict.fromkeys(LOCK_REQUESTS, self._serve))
        else:
            table.batch.update(dict.fromkeys(LOCK_REQUESTS, self._on_batch))
            table.eager.update(dict.fromkeys(LOCK_REQUESTS, self._at_once))
        return table

    async def on_describe(self, request: Describe) -> Description:
        # A coroutine, although it does not wait: because of it, a caller that would block for a lock in the thread of an
        # event loop is refused. The lock may be given back by a task of this very loop.
        return Description(self.ctx.address, self._store.name, ("locks",), {"max_waiters": self._max_waiters})

    def on_take_snapshot(self, request: TakeSnapshot) -> Snapshot:
        guard = self._client.statistics() if isinstance(self._client, LockStoreClient) else {}
        restarts, overloaded = self.ctx.restarts, self.ctx.overloaded
        return Snapshot(self.ctx.address, self._store.name, restarts=restarts, overloaded=overloaded, guard=guard)

    async def _on_batch(self, batch: Sequence[Request[Any]]) -> Sequence[Reply | DeferredReply]:
        return [self._served(request) for request in batch]

    def _at_once(self, request: Request[Any]) -> Reply | DeferredReply | None:
        return self._served(request) if get_ident() == self._thread else None

    def _served(self, request: Request[Any]) -> Reply | DeferredReply:
        try:
            return self._serve(request)
        except CacheError as error:
            return Failed.of(error)

    def _serve(self, request: Any) -> Reply | DeferredReply:
        answer = LockReply()
        check_lock_request(request)
        match request:
            case AcquireLock():
                self._acquire(request, answer)
            case ReleaseLock():
                self._release(request, answer)
            case _:
                self._client.ask(request, answer.give)
        self._arm()
        return answer.take(self.ctx.defer)

    def _acquire(self, request: AcquireLock, answer: LockReply) -> None:
        now = self.ctx.clock.monotonic()
        waiter = self._waiters.get((request.name, request.ticket))
        if waiter is not None:
            waiter.give(LockQueued("", 0.0))  # Asked twice: the first one to ask waits no longer.
            waiter.request, waiter.answer, waiter.ends = request, answer, now + request.wait
            self._await(waiter, min(waiter.ends, now + PARKED))
            if self._shared or request.wait <= 0 or not waiter.queued:
                self._ask_for(waiter)
            return
        if len(self._waiters) >= self._max_waiters:
            raise Overloaded(f"{self._max_waiters} callers wait for locks, which is the most", "", self._max_waiters)
        waiter = Waiter(request, answer, now + request.wait)
        self._waiters[request.name, request.ticket] = waiter
        if self._store.poll is not None and request.wait > 0:
            # The store keeps no queue, so this is the queue, also while the first of it is being asked for.
            if (queue := self._queues.get(request.name)) is not None:
                self._queue(waiter, queue.owner, max(0.0, queue.ends_at - now), now)
                return
            self._queues[request.name] = queue = LockQueue()
            queue.waiters[request.ticket] = waiter
        self._ask_for(waiter)

    def _release(self, request: ReleaseLock, answer: LockReply) -> None:
        waiter = self._waiters.get((request.name, request.ticket))
        if waiter is None:

            def released(reply: Reply) -> None:
                if isinstance(reply, Released) and request.token:
                    self.ctx.emit(LockReleased, request.name, request.owner, request.token)
                answer.give(reply)
                if self._store.poll is not None:
                    self.look(request.name)

            self._client.ask(request, released)
            return
        self._forget(waiter)
        if waiter.is_there:
            waiter.give(LockDenied("", 0.0))
        if waiter.asking:
            waiter.left = True  # What comes of it is given back.
            answer.give(Released())
        else:
            self._client.ask(waiter.abandoned(), answer.give)

    def _ask_for(self, waiter: Waiter) -> None:
        if waiter.asking:
            waiter.again = True
            return
        waiter.asking, waiter.again = True, False
        self._client.ask(waiter.request, lambda reply: self._replied(waiter, reply))

    def _replied(self, waiter: Waiter, reply: Reply) -> None:
        waiter.asking = False
        now = self.ctx.clock.monotonic()
        if waiter.left:
            self._give_up(waiter)
        elif isinstance(reply, LockGranted):
            self._grant(waiter, reply)
        elif isinstance(reply, Failed):
            self._failed(waiter, reply, now)
        elif isinstance(reply, LockDenied) and (self._store.poll is None or waiter.request.wait <= 0):
            self._forget(waiter)
            waiter.give(reply)
        else:
            assert isinstance(reply, LockQueued | LockDenied)
            self._wait_on(waiter, reply, now)

    def _wait_on(self, waiter: Waiter, reply: LockQueued | LockDenied, now: float) -> None:
        waiter.trouble = None
        lost_its_place = isinstance(reply, LockQueued) and reply.fresh and waiter.queued
        self._queue(waiter, reply.owner, reply.remaining, now)
        if lost_its_place:
            # And so have the others, who ask when the first of them has.
            first, *others = self._queues[waiter.request.name].waiters.values()
            for each in others if first is waiter else [first]:
                self._ask_for(each)
        if waiter.again:
            self._ask_for(waiter)

    def _queue(self, waiter: Waiter, owner: str, remaining: float, now: float) -> None:
        request = waiter.request
        queue = self._queues.setdefault(request.name, LockQueue())
        queue.owner, queue.ends_at, queue.overdue = owner, now + remaining, False
        if not waiter.queued:
            waiter.queued = True
            queue.waiters[request.ticket] = waiter
            self._await(waiter, min(waiter.ends, now + PARKED))
        if self._store.poll is None:
            self._look_at(queue.ends_at + SLACK, request.name)
        elif next(iter(queue.waiters)) == request.ticket:
            queue.pause = min(max(self._store.poll, queue.pause * 1.5), self._store.poll * POLL_MAX)
            self._look_at(now + queue.pause * (0.5 + self._draw()), request.name)

    def _grant(self, waiter: Waiter, grant: LockGranted) -> None:
        request = waiter.request
        self._leave_queue(waiter)
        if waiter.answer is None and waiter.until > self.ctx.clock.monotonic():
            waiter.queued = False  # Its caller comes again, and finds the lock then.
            return
        self._forget(waiter)
        if not waiter.is_there:
            self._give_up(waiter, unclaimed=True)
            return
        self.ctx.emit(LockAcquired, request.name, request.owner, grant.token)
        waiter.give(grant)

    def _failed(self, waiter: Waiter, reply: Failed, now: float) -> None:
        transient = error_class(reply.code).transient
        if waiter.queued and transient and waiter.ends > now:
            waiter.trouble = reply
            if waiter.request.name in self._queues:
                self._look_at(now + AGAIN, waiter.request.name)
            return
        queue, others = self._queues.get(waiter.request.name), list[Waiter]()
        if queue is not None and not waiter.queued and waiter.request.ticket in queue.waiters:
            # The store has not been heard yet, so each of those who came meanwhile asks for itself.
            others = [each for each in queue.waiters.values() if each is not waiter]
        self._forget(waiter)
        for each in others:
            each.queued = False
            self._ask_for(each)
        waiter.give(reply)
        if transient:
            self._give_up(waiter)  # Whether it was done is not known.

    def _give_up(self, waiter: Waiter, *, unclaimed: bool = False) -> None:
        def gone(reply: Reply) -> None:
            if self._store.poll is not None:
                self.look(waiter.request.name)

        self._client.ask(waiter.abandoned(unclaimed=unclaimed), gone)

    # For the store: `LockListener`

    def granted(self, name: str, ticket: str, grant: LockGranted) -> None:
        waiter = self._waiters.get((name, ticket))
        if waiter is None:
            # Another manager's, or one of an incarnation before this one.
            self._client.ask(ReleaseLock(name, ticket, unclaimed=True), lambda reply: None)
        elif waiter.asking:
            waiter.again = True
        else:
            self._grant(waiter, grant)

    def look(self, name: str, ticket: str = "", delay: float = 0.0) -> None:
        if delay > 0:
            self.ctx.timers.call_after(delay, partial(self._client.ask, DescribeLock(name), lambda reply: None))
            return
        if ticket:
            if (waiter := self._waiters.get((name, ticket))) is not None:
                self._ask_for(waiter)
            else:
                # It has gone; or it has the lock by now, because it asked once more while this was on its way.
                self._client.ask(ReleaseLock(name, ticket, unclaimed=True, offered=True), lambda reply: None)
        elif (queue := self._queues.get(name)) is not None:
            queue.pause = 0.0
            self._ask_for(next(iter(queue.waiters.values())))

    def look_everywhere(self) -> None:
        for queue in [*self._queues.values()]:
            for waiter in [*queue.waiters.values()]:
                self._ask_for(waiter)

    def expired(self, name: str, owner: str, token: int) -> None:
        self.ctx.emit(LockExpired, name, owner, token)

    def on_sweep(self, request: Sweep) -> Deleted:
        """Look at what is due."""
        now, self._sweeps_at = self.ctx.clock.monotonic(), math.inf
        if isinstance(self._client, InlineLockClient):  # A server sweeps by itself.
            self._client.sweep()
        for name, ticket in [*self._due.expire(now)]:
            if ticket:
                if (waiter := self._waiters.get((name, ticket))) is not None and waiter.until <= now:
                    self._waited(waiter, now)
            elif (queue := self._queues.get(name)) is not None and (name, "") not in self._due:
                queue.overdue = True
                self._ask_for(next(iter(queue.waiters.values())))
        self._arm()
        return Deleted(0)

    def _waited(self, waiter: Waiter, now: float) -> None:
        """The caller has waited long enough, for now or altogether; or it has not asked again."""
        queue, was_there = self._queues.get(waiter.request.name, LockQueue()), waiter.is_there
        remaining = max(0.0, queue.ends_at - now)
        if waiter.answer is not None and was_there and waiter.ends > now:
            answer, waiter.answer = waiter.answer, None
            self._await(waiter, now + KEPT)
            answer.give(LockQueued(queue.owner, remaining))
            return
        self._forget(waiter)
        waiter.give(waiter.trouble or LockDenied(queue.owner, remaining))
        if waiter.asking:
            waiter.left = True
        else:
            self._give_up(waiter, unclaimed=not was_there)

    def _await(self, waiter: Waiter, until: float) -> None:
        waiter.until = until
        self._look_at(waiter.until, waiter.request.name, waiter.request.ticket)

    def _look_at(self, when: float, name: str, ticket: str = "") -> None:
        if self._due.set((name, ticket), when):
            self._arm()

    def _arm(self) -> None:
        due = self._due.due()
        if self._inline is not None and (expiry := self._inline.next_expiry()) is not None:
            due = min(due, expiry)
        if due < self._sweeps_at:
            if self._sweep_timer is not None:
                self._sweep_timer.cancel()
            self._sweeps_at = due
            self._sweep_timer = self.ctx.send_after(due - self.ctx.clock.monotonic(), Sweep())

    def _forget(self, waiter: Waiter) -> None:
        which = (waiter.request.name, waiter.request.ticket)
        self._waiters.pop(which, None)
        self._due.discard(which)
        self._leave_queue(waiter)

    def _leave_queue(self, waiter: Waiter) -> None:
        name = waiter.request.name
        if (queue := self._queues.get(name)) is not None and queue.waiters.pop(waiter.request.ticket, None) is not None:
            if not queue.waiters:
                del self._queues[name]
                self._due.discard((name, ""))
            elif self._store.poll is not None or queue.overdue:
                delay = (self._store.poll or 0.0) * (0.5 + self._draw())
                self._look_at(self.ctx.clock.monotonic() + delay, name)
