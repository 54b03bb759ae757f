"""The actor that grants locks. It keeps the waiting callers in the order of their arrival.

The store decides atomically which caller holds a lock. The manager sends it a request for a caller. It repeats the
request when the state may have changed: after a notification of the store, the end of a lease, or a reconnect.
`AcquireLock` is idempotent, so it can be repeated any number of times.
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

PARKED = 10.0  # Seconds after which a waiting caller must repeat its request, which shows that it is alive.
KEPT = 5.0  # Seconds for which the queue position of such a caller is kept.
RETRY_INTERVAL = 1.0  # Seconds until requests for the waiters are retried after the store has failed.
SLACK = 0.001  # Seconds to wait after the end of a lease, so that the store has noticed it.
POLL_MAX = 12  # Maximum pause between two polls of a store without a queue, as a multiple of the minimum.


class LockManager(Actor):
    """The actor in front of a `LockStore`.

    At most `max_waiters` callers may wait for a lock or for a reply of the store. `shared` means that several managers
    serve the address, so a caller's next request may reach another one.
    """

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
        self._waiters: dict[tuple[str, str], Waiter] = {}  # By lock name and ticket.
        self._queues: dict[str, LockQueue] = {}
        self._due: TimerQueue[tuple[str, str]] = TimerQueue()  # Keys of waiters, and of locks with an empty ticket.
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
        withdrawals = [each.withdrawal(unclaimed=True) for each in self._waiters.values()]
        for each in self._waiters.values():
            each.give(LockQueued("", 0.0))  # Another manager may serve the same store.
        self._waiters.clear()
        self._queues.clear()
        await self._client.close(withdrawals)

    def repair(self) -> None:
        # A new incarnation follows. Waiting callers must repeat their requests, and the store knows their positions.
        if self._inline is not None:
            self._inline.repair()

    def handlers(self) -> Handlers:
        table = super().handlers()
        if self._inline is not None:
            table.plain.update(dict.fromkeys(LOCK_REQUESTS, self._serve))
        else:
            table.batch.update(dict.fromkeys(LOCK_REQUESTS, self._on_batch))
            table.eager.update(dict.fromkeys(LOCK_REQUESTS, self._serve_eagerly))
        return table

    async def on_describe(self, request: Describe) -> Description:
        # A coroutine, although it does not wait, so that a blocking call for a lock in an event loop's thread is
        # rejected. A task of that loop may have to release the lock.
        return Description(self.ctx.address, self._store.name, ("locks",), {"max_waiters": self._max_waiters})

    def on_take_snapshot(self, request: TakeSnapshot) -> Snapshot:
        guard = self._client.statistics() if isinstance(self._client, LockStoreClient) else {}
        restarts, overloaded = self.ctx.restarts, self.ctx.overloaded
        return Snapshot(self.ctx.address, self._store.name, restarts=restarts, overloaded=overloaded, guard=guard)

    async def _on_batch(self, batch: Sequence[Request[Any]]) -> Sequence[Reply | DeferredReply]:
        return [self._served(request) for request in batch]

    def _serve_eagerly(self, request: Request[Any]) -> Reply | DeferredReply | None:
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
            waiter.give(LockQueued("", 0.0))  # A repeated request: the earlier one no longer waits.
            waiter.request, waiter.answer, waiter.ends = request, answer, now + request.wait
            self._await(waiter, min(waiter.ends, now + PARKED))
            if self._shared or request.wait <= 0 or not waiter.queued:
                self._ask_for(waiter)
            return
        if len(self._waiters) >= self._max_waiters:
            raise Overloaded(f"{self._max_waiters} callers already wait for locks", "", self._max_waiters)
        waiter = Waiter(request, answer, now + request.wait)
        self._waiters[request.name, request.ticket] = waiter
        if self._store.poll is not None and request.wait > 0:
            # The store keeps no queue, so the manager does, even while the first request is in flight.
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
        if waiter.caller_waits:
            waiter.give(LockDenied("", 0.0))
        if waiter.in_flight:
            waiter.withdrawn = True  # If the lock is granted, it is released.
            answer.give(Released())
        else:
            self._client.ask(waiter.withdrawal(), answer.give)

    def _ask_for(self, waiter: Waiter) -> None:
        if waiter.in_flight:
            waiter.ask_again = True
            return
        waiter.in_flight, waiter.ask_again = True, False
        self._client.ask(waiter.request, lambda reply: self._replied(waiter, reply))

    def _replied(self, waiter: Waiter, reply: Reply) -> None:
        waiter.in_flight = False
        now = self.ctx.clock.monotonic()
        if waiter.withdrawn:
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
        waiter.last_failure = None
        lost_its_position = isinstance(reply, LockQueued) and reply.fresh and waiter.queued
        self._queue(waiter, reply.owner, reply.remaining, now)
        if lost_its_position:
            # The other waiters have lost their positions too. They ask after the first one has.
            first, *others = self._queues[waiter.request.name].waiters.values()
            for each in others if first is waiter else [first]:
                self._ask_for(each)
        if waiter.ask_again:
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
            waiter.queued = False  # The caller repeats its request and gets the lock then.
            return
        self._forget(waiter)
        if not waiter.caller_waits:
            self._give_up(waiter, unclaimed=True)
            return
        self.ctx.emit(LockAcquired, request.name, request.owner, grant.token)
        waiter.give(grant)

    def _failed(self, waiter: Waiter, reply: Failed, now: float) -> None:
        transient = error_class(reply.code).transient
        if waiter.queued and transient and waiter.ends > now:
            waiter.last_failure = reply
            if waiter.request.name in self._queues:
                self._look_at(now + RETRY_INTERVAL, waiter.request.name)
            return
        queue, others = self._queues.get(waiter.request.name), list[Waiter]()
        if queue is not None and not waiter.queued and waiter.request.ticket in queue.waiters:
            # The store has not replied yet, so a request is sent for each waiter that has arrived meanwhile.
            others = [each for each in queue.waiters.values() if each is not waiter]
        self._forget(waiter)
        for each in others:
            each.queued = False
            self._ask_for(each)
        waiter.give(reply)
        if transient:
            self._give_up(waiter)  # The lock may have been granted.

    def _give_up(self, waiter: Waiter, *, unclaimed: bool = False) -> None:
        def released(reply: Reply) -> None:
            if self._store.poll is not None:
                self.look(waiter.request.name)

        self._client.ask(waiter.withdrawal(unclaimed=unclaimed), released)

    # For the store: `LockListener`

    def granted(self, name: str, ticket: str, grant: LockGranted) -> None:
        waiter = self._waiters.get((name, ticket))
        if waiter is None:
            # A waiter of another manager or of an earlier incarnation.
            self._client.ask(ReleaseLock(name, ticket, unclaimed=True), lambda reply: None)
        elif waiter.in_flight:
            waiter.ask_again = True
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
                # The waiter has left, or it already has the lock because it repeated its request meanwhile.
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
        """Handle the waiters and leases that are due."""
        now, self._sweeps_at = self.ctx.clock.monotonic(), math.inf
        if isinstance(self._client, InlineLockClient):  # A server expires its leases itself.
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
        """Handle a waiter whose wait or parking interval has ended, or whose caller has not repeated its request."""
        queue, had_caller = self._queues.get(waiter.request.name, LockQueue()), waiter.caller_waits
        remaining = max(0.0, queue.ends_at - now)
        if waiter.answer is not None and had_caller and waiter.ends > now:
            answer, waiter.answer = waiter.answer, None
            self._await(waiter, now + KEPT)
            answer.give(LockQueued(queue.owner, remaining))
            return
        self._forget(waiter)
        waiter.give(waiter.last_failure or LockDenied(queue.owner, remaining))
        if waiter.in_flight:
            waiter.withdrawn = True
        else:
            self._give_up(waiter, unclaimed=not had_caller)

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
