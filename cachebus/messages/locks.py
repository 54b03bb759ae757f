"""Locks: the right of one holder in the whole fleet, for a time, with a number that grows from holder to holder."""

from __future__ import annotations

from .base import IdempotentRequest, Reply
from .leases import NotHeld, Released, Renewed


class LockGranted(Reply, frozen=True, gc=False, tag="reply.lock_granted"):
    """Whoever asked holds the lock for `ttl` seconds, from when it asked or later. `token` is larger than that of every
    holder before."""

    token: int
    ttl: float


class LockQueued(Reply, frozen=True, gc=False, tag="reply.lock_queued"):
    """`owner` holds the lock, for `remaining` seconds more if it does not renew it, and whoever asked has a place in the
    queue. It asks again with the same ticket, soon, to keep that. `fresh` says that it had no place before."""

    owner: str
    remaining: float
    fresh: bool = False


class LockDenied(Reply, frozen=True, gc=False, tag="reply.lock_denied"):
    """`owner` holds the lock, for `remaining` seconds more if it does not renew it; whoever asked does not wait."""

    owner: str
    remaining: float


class LockInfo(Reply, frozen=True, gc=False, tag="reply.lock_info"):
    """Who holds a lock: what it calls itself, its fencing token, and the seconds that it has left."""

    owner: str
    token: int
    remaining: float


class LockFree(Reply, frozen=True, gc=False, tag="reply.lock_free"):
    """Nobody holds the lock."""


class AcquireLock(IdempotentRequest[LockGranted | LockQueued | LockDenied], frozen=True, gc=False, tag="lock.acquire"):
    """Hold the lock `name` for `ttl` seconds.

    `ticket` names this one attempt, and nobody has used it before; asked for twice, the lock is granted once, and held
    for `ttl` seconds from then. `owner` is who others are told that it is. Who cannot have it yet waits in a queue for up
    to `wait` seconds: first come, first served.
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
    """Give a lock back, or the place in its queue. `owner` is for those who listen.

    `token` is that of the grant: with it the lock may be given back again when the answer was lost, whoever has it by then.
    Without it the lock is taken from its holder, who is told so when it gives it back.

    With `abandon` whoever asked does not know what became of its `AcquireLock`: should that come only now, it is refused. With
    `unclaimed` a manager gives up what it was not asked for again; only if no other manager was, and it may come again. With
    `offered` it gives up no more than an offer that nobody has taken up.
    """

    name: str
    ticket: str
    owner: str = ""
    token: int = 0
    abandon: bool = False
    unclaimed: bool = False
    offered: bool = False


class DescribeLock(IdempotentRequest[LockInfo | LockFree], frozen=True, gc=False, tag="lock.describe"):
    """Say who holds a lock."""

    name: str
