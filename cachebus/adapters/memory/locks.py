"""Locks in the memory of the process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cachebus.actors.ports import SYSTEM_CLOCK, Clock, LockListener, TimerQueue
from cachebus.messages import (
    AcquireLock,
    CapabilityError,
    DescribeLock,
    LockDenied,
    LockFree,
    LockGranted,
    LockInfo,
    LockNotOwned,
    LockQueued,
    NotHeld,
    Overloaded,
    Released,
    ReleaseLock,
    Renewed,
    RenewLock,
    Reply,
    Request,
)


@dataclass(slots=True, eq=False)
class _Held:
    ticket: str
    owner: str
    token: int
    expires_at: float


class LockTable:
    """An `InlineLockStore` for one process, with at most `max_locks` held locks and their queues.

    Fencing tokens are Unix time in microseconds, or one more than the last token. They grow even across restarts,
    unless the clock is set back. The table outlives its actor, so a crash of the actor does not release locks.
    """

    name = "memory"
    poll: float | None = None

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK, max_locks: int = 100_000) -> None:
        self.listener: LockListener | None = None
        self._clock = clock
        self._now = clock.monotonic
        self._max_locks = max_locks
        self._held: dict[str, _Held] = {}
        self._queues: dict[str, dict[str, AcquireLock]] = {}
        self._last_token = 0
        self._since = math.inf
        self._lost: dict[str, int] = {}  # Last token with which each lock was lost.
        self._ends: TimerQueue[str] = TimerQueue()

    def __repr__(self) -> str:
        waiting = sum(map(len, self._queues.values()))
        return f"<LockTable {len(self._held)}/{self._max_locks} held, {waiting} waiting>"

    def decide(self, request: Request[Any]) -> Reply:
        match request:
            case AcquireLock():
                return self._acquire(request)
            case RenewLock():
                return self._renew(request)
            case ReleaseLock():
                return self._release(request)
            case DescribeLock():
                return self._describe(request)
            case _:
                raise CapabilityError(store=self.name, capability=type(request).__name__)

    def next_expiry(self) -> float | None:
        due = self._ends.due()
        return None if due == math.inf else due

    def sweep(self) -> None:
        now = self._now()
        while (name := self._ends.pop(now)) is not None:
            self._holder(name, now)
            self._pass_on(name, now)

    def repair(self) -> None:
        self._queues = {name: queue for name, queue in self._queues.items() if queue}
        self._ends.clear()
        for name, held in self._held.items():
            self._ends.set(name, held.expires_at)

    def _acquire(self, request: AcquireLock) -> Reply:
        name, ticket, now = request.name, request.ticket, self._now()
        held = self._holder(name, now)
        if held is None and name in self._queues:
            held = self._pass_on(name, now, asks=ticket)
        if held is None:
            return self._grant(request, now)
        if held.ticket == ticket:
            held.expires_at = now + request.ttl
            self._ends.set(name, held.expires_at)
            return LockGranted(held.token, request.ttl)
        remaining = held.expires_at - now
        if request.wait <= 0:
            self._leave(name, ticket)
            return LockDenied(held.owner, remaining)
        queue = self._queues.setdefault(name, {})
        fresh = ticket not in queue
        queue[ticket] = request
        return LockQueued(held.owner, remaining, fresh)

    def _renew(self, request: RenewLock) -> Reply:
        now = self._now()
        held = self._holder(request.name, now)
        if held is None:
            self._pass_on(request.name, now)
            return NotHeld()
        if held.ticket != request.ticket:
            raise LockNotOwned(name=request.name, owner=held.owner)
        held.expires_at = now + request.ttl
        self._ends.set(request.name, held.expires_at)
        return Renewed(request.ttl)

    def _release(self, request: ReleaseLock) -> Reply:
        name, now = request.name, self._now()
        held = self._holder(name, now)
        if held is not None and held.ticket == request.ticket:
            self._drop(name)
            if request.token != held.token and not (request.abandon or request.unclaimed):
                self._note_loss(name, held.token)  # The lock was taken from its holder.
            self._pass_on(name, now)
            return Released()
        # A release is repeated with the same token if its reply was lost.
        newest = self._last_token if held is None else held.token - 1
        already_released = max(self._since, self._lost.get(name, 0) + 1) <= request.token <= newest
        if held is None:
            self._pass_on(name, now)
        if self._leave(name, request.ticket) or already_released:
            return Released()
        if held is not None and not (request.abandon or request.unclaimed):
            raise LockNotOwned(name=name, owner=held.owner)
        return NotHeld()

    def _describe(self, request: DescribeLock) -> Reply:
        now = self._now()
        held = self._holder(request.name, now) or self._pass_on(request.name, now)
        return LockFree() if held is None else LockInfo(held.owner, held.token, held.expires_at - now)

    def _holder(self, name: str, now: float) -> _Held | None:
        """Return the current holder of a lock. If the lock has expired, remove the holder and return `None`."""
        held = self._held.get(name)
        if held is not None and held.expires_at <= now:
            self._drop(name)
            self._note_loss(name, held.token)
            if self.listener is not None:
                self.listener.expired(name, held.owner, held.token)
            return None
        return held

    def _drop(self, name: str) -> None:
        del self._held[name]
        self._ends.discard(name)

    def _note_loss(self, name: str, token: int) -> None:
        if len(self._lost) >= self._max_locks and name not in self._lost:
            # Forgotten locks count as lost, which is the safe reply to a caller that releases one.
            self._since = self._last_token + 1
            self._lost.clear()
        self._lost[name] = token

    def _pass_on(self, name: str, now: float, asks: str = "") -> _Held | None:
        """Grant a free lock to the first waiter, and notify it unless its ticket is `asks`, the current request."""
        queue = self._queues.get(name)
        if not queue:
            return None
        request = queue[next(iter(queue))]
        granted = self._grant(request, now)
        if self.listener is not None and request.ticket != asks:
            self.listener.granted(name, request.ticket, granted)
        return self._held[name]

    def _grant(self, request: AcquireLock, now: float) -> LockGranted:
        if len(self._held) >= self._max_locks:
            self.sweep()
            if len(self._held) >= self._max_locks:
                raise Overloaded(f"the maximum of {self._max_locks} locks are held", "", self._max_locks)
        self._leave(request.name, request.ticket)
        self._last_token = token = max(self._last_token + 1, int(self._clock.wall() * 1e6))
        self._since = min(self._since, token)
        held = self._held[request.name] = _Held(request.ticket, request.owner, token, now + request.ttl)
        self._ends.set(request.name, held.expires_at)
        return LockGranted(token, request.ttl)

    def _leave(self, name: str, ticket: str) -> bool:
        queue = self._queues.get(name)
        if queue is None or queue.pop(ticket, None) is None:
            return False
        if not queue:
            del self._queues[name]
        return True
