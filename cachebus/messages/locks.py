"""Lock messages.

A lock has one holder among all processes, expires, and has a fencing token that grows with every grant.
"""

from __future__ import annotations

from .base import IdempotentRequest, Reply
from .leases import NotHeld, Released, Renewed


class LockGranted(Reply, frozen=True, gc=False, tag="reply.lock_granted"):
    """The caller holds the lock for at least `ttl` seconds from its request.

    `token` is the fencing token, larger than that of any earlier holder.
    """

    token: int
    ttl: float


class LockQueued(Reply, frozen=True, gc=False, tag="reply.lock_queued"):
    """The caller is queued for the lock.

    It keeps its position only if it soon repeats the request with the same ticket.

    `owner` holds the lock, which expires in `remaining` seconds unless renewed. `fresh` is true if the caller was not
    queued before.
    """

    owner: str
    remaining: float
    fresh: bool = False


class LockDenied(Reply, frozen=True, gc=False, tag="reply.lock_denied"):
    """The lock is held and the caller is not queued.

    `owner` holds it; it expires in `remaining` seconds unless renewed.
    """

    owner: str
    remaining: float


class LockInfo(Reply, frozen=True, gc=False, tag="reply.lock_info"):
    """The holder of a lock: the name it chose, its fencing token, and the seconds until the lock expires."""

    owner: str
    token: int
    remaining: float


class LockFree(Reply, frozen=True, gc=False, tag="reply.lock_free"):
    """The lock is free."""


class AcquireLock(IdempotentRequest[LockGranted | LockQueued | LockDenied], frozen=True, gc=False, tag="lock.acquire"):
    """Acquire the lock `name` for `ttl` seconds.

    `ticket` identifies the attempt and must be unique. A repeated request does not grant the lock again; it extends it
    to `ttl` seconds from then. `owner` is the holder's name as other callers see it. If the lock is held, the caller
    waits in a first-come, first-served queue for up to `wait` seconds.
    """

    name: str
    owner: str
    ticket: str
    ttl: float
    wait: float = 0.0


class RenewLock(IdempotentRequest[Renewed | NotHeld], frozen=True, gc=False, tag="lock.renew"):
    """Extend a lock to `ttl` seconds from now. A lost lock is not acquired again."""

    name: str
    ticket: str
    ttl: float


class ReleaseLock(IdempotentRequest[Released | NotHeld], frozen=True, gc=False, tag="lock.release"):
    """Release a lock, or leave its queue. `owner` is used only in events.

    `token` is the fencing token of the grant. With it, the release can be repeated after a lost reply, even if the lock
    has another holder by then. Without it, the lock is taken from its holder, whose release then fails.

    `abandon` means that the caller got no reply to its `AcquireLock`; if that request arrives later, it is refused.
    With `unclaimed`, a lock manager releases a lock whose client stopped asking for it, unless the client asked another
    manager; the client may ask again. With `offered`, only an offer that the client has not accepted is withdrawn.
    """

    name: str
    ticket: str
    owner: str = ""
    token: int = 0
    abandon: bool = False
    unclaimed: bool = False
    offered: bool = False


class DescribeLock(IdempotentRequest[LockInfo | LockFree], frozen=True, gc=False, tag="lock.describe"):
    """Return the holder of a lock."""

    name: str
