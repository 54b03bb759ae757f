"""Callers that wait for locks at a manager, the queue of each lock, and the check of what callers ask."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from cachebus.bus import DeferredReply
from cachebus.messages import (
    AcquireLock,
    BadMessage,
    CacheKeyError,
    DescribeLock,
    Failed,
    ReleaseLock,
    RenewLock,
    Reply,
)

LONGEST = 1e9  # Seconds that a lock may be held or waited for: thirty years.


class LockReply(Struct, eq=False):
    """The reply to one request: the handler returns it, or it is given later."""

    reply: Reply | None = None
    deferred: DeferredReply | None = None

    def give(self, reply: Reply) -> None:
        """Give the reply."""
        if self.deferred is None:
            self.reply = reply
        else:
            self.deferred.answer(reply)

    def take(self, defer: Callable[[], DeferredReply]) -> Reply | DeferredReply:
        """The return value of the handler."""
        if self.reply is not None:
            return self.reply
        self.deferred = defer()
        return self.deferred

    @property
    def waiting(self) -> bool:
        """Whether the caller may still wait for it."""
        return self.reply is None if self.deferred is None else self.deferred.waiting


class Waiter(Struct, eq=False):
    """One attempt to acquire a lock."""

    request: AcquireLock
    answer: LockReply | None  # `None` from when the caller was asked to come again until it does.
    ends: float  # When the caller's patience ends.
    until: float = 0.0  # When it is answered, or given up if its caller has not come again.
    asking: bool = False  # The store is being asked for it.
    again: bool = False  # The store is to be asked once more after that.
    left: bool = False  # The caller has given up while the store was being asked.
    queued: bool = False
    trouble: Failed | None = None  # Why the store could not be asked the last time.

    @property
    def is_there(self) -> bool:
        """Whether the caller waits for an answer."""
        return self.answer is not None and self.answer.waiting

    def give(self, reply: Reply) -> None:
        """Answer the caller, if it waits."""
        if self.answer is not None:
            self.answer.give(reply)

    def abandoned(self, *, unclaimed: bool = False) -> ReleaseLock:
        """The request that takes back what was asked. `unclaimed`: the caller may ask another manager."""
        return ReleaseLock(self.request.name, self.request.ticket, abandon=not unclaimed, unclaimed=unclaimed)


class LockQueue(Struct, eq=False):
    """The waiters of one lock by ticket, in the order in which they came."""

    waiters: dict[str, Waiter] = {}
    owner: str = ""
    ends_at: float = 0.0  # When the lease of `owner` ends, as far as is known.
    overdue: bool = False  # The lease has ended and no holder was named since: places may be lost.
    pause: float = 0.0  # Seconds for which a store without a queue is left alone.


def check_lock_request(request: AcquireLock | RenewLock | ReleaseLock | DescribeLock) -> None:
    """Check what other programs on the bus may send. Raises `BadMessage`, or `CacheKeyError` for a name."""
    if not request.name:
        raise CacheKeyError("the name of a lock must not be empty")
    if not _is_text(request.name):
        raise CacheKeyError("the name of a lock must be valid Unicode", ascii(request.name)[:60])
    if isinstance(request, DescribeLock):
        return
    if not 0 < len(request.ticket) <= 255 or "|" in request.ticket or not request.ticket.isprintable():
        raise BadMessage("the ticket of a lock has 1 to 255 printable characters, and no |")
    if isinstance(request, ReleaseLock):
        return
    if not 0 < request.ttl <= LONGEST:
        raise BadMessage(f"ttl must be a positive number of seconds, 1e9 at most, not {request.ttl!r}")
    if isinstance(request, AcquireLock):
        if not 0 <= request.wait <= LONGEST:
            raise BadMessage(f"wait must be a number of seconds from 0 to 1e9, not {request.wait!r}")
        if not _is_text(request.owner):
            raise BadMessage("the owner of a lock must be valid Unicode")


def _is_text(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
