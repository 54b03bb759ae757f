"""Locks: the right of one holder among all processes, for a time, with a number that grows from holder to holder."""

from __future__ import annotations

from .base import IdempotentRequest, Reply
from .leases import NotHeld, Released, Renewed


class LockGranted(Reply, frozen=True, gc=False, tag="reply.lock_granted"):
    """The caller holds the lock for `ttl` seconds, from its request or later. `token` is larger than that of any holder before."""

    token: int
    ttl: float


class LockQueued(Reply, frozen=True, gc=False, tag="reply.lock_queued"):
    """`owner` holds the lock, for `remaining` seconds more if it does not renew it, and the caller has a place in the queue. To
    keep that, it soon asks again with the same ticket. `fresh` says that it had no place before."""

    owner: str
    remaining: float
    fresh: bool = False


class LockDenied(Reply, frozen=True, gc=False, tag="reply.lock_denied"):
    """`owner` holds the lock, for `remaining` seconds more if it does not renew it; the caller has no place in the queue."""

    owner: str
    remaining: float


class LockInfo(Reply, frozen=True, gc=False, tag="reply.lock_info"):
    """The holder of a lock: its name for itself, its fencing token, and the seconds that it has left."""

    owner: str
    token: int
    remaining: float


class LockFree(Reply, frozen=True, gc=False, tag="reply.lock_free"):
    """The lock is free."""


class AcquireLock(IdempotentRequest[LockGranted | LockQueued | LockDenied], frozen=True, gc=False, tag="lock.acquire"):
    """Hold the lock `name` for `ttl` seconds.

    `ticket` names this attempt, and is used once: asked for twice, the lock is granted once, and held for `ttl` seconds from
    then. `owner` names the holder to others. If the lock is held, the caller waits in a queue for up to `wait` seconds: first
    come, first served.
    """

    name: str
    owner: str
    ticket: str
    ttl: float
    wait: float = 0.0


class RenewLock(IdempotentRequest[Renewed | NotHeld], frozen=True, gc=False, tag="lock.renew"):
    """Hold a lock for `ttl` seconds from now. One that was lost is not held again."""

    name: str
    ticket: str
    ttl: float


class ReleaseLock(IdempotentRequest[Released | NotHeld], frozen=True, gc=False, tag="lock.release"):
    """Release a lock, or the place in its queue. `owner` is for events.

    `token` is that of the grant: with it the release may be repeated when the answer was lost, even if the lock has another
    holder by then. Without it the lock is taken from its holder, whose own release then fails.

    `abandon` is for a caller that has no answer to its `AcquireLock`: if that comes only later, it is refused. With `unclaimed` a
    manager releases a lock that its client did not ask for again, unless the client asked another manager; it may ask again.
    With `offered` it withdraws only an offer that was not taken up.
    """

    name: str
    ticket: str
    owner: str = ""
    token: int = 0
    abandon: bool = False
    unclaimed: bool = False
    offered: bool = False


class DescribeLock(IdempotentRequest[LockInfo | LockFree], frozen=True, gc=False, tag="lock.describe"):
    """Describe the holder of a lock."""

    name: str
