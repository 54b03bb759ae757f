"""The waiters of a lock manager, the queue of each lock, and the validation of lock requests."""

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

MAX_SECONDS = 1e9  # Limit of the lease and of the wait for a lock: about thirty years.


class LockReply(Struct, eq=False):
    """The reply to one request. The handler returns it, or it is given later."""

    reply: Reply | None = None
    deferred: DeferredReply | None = None

    def give(self, reply: Reply) -> None:
        """Give the reply."""
        if self.deferred is None:
            self.reply = reply
        else:
            self.deferred.answer(reply)

    def take(self, defer: Callable[[], DeferredReply]) -> Reply | DeferredReply:
        """Return the reply, or a deferred reply if it is not known yet. This is the return value of the handler."""
        if self.reply is not None:
            return self.reply
        self.deferred = defer()
        return self.deferred

    @property
    def waiting(self) -> bool:
        """True if the caller may still wait for the reply."""
        return self.reply is None if self.deferred is None else self.deferred.waiting


class Waiter(Struct, eq=False):
    """One attempt to acquire a lock."""

    request: AcquireLock
    answer: LockReply | None  # `None` after the caller was asked to repeat its request, until it does.
    ends: float  # End of the caller's wait.
    until: float = 0.0  # When it is answered, or dropped if its caller has not repeated the request.
    in_flight: bool = False  # A request to the store is in flight.
    ask_again: bool = False  # Send another request to the store after that.
    withdrawn: bool = False  # The caller gave up while the request was in flight.
    queued: bool = False
    last_failure: Failed | None = None  # The reply if the last request to the store failed.

    @property
    def caller_waits(self) -> bool:
        """True if the caller waits for a reply."""
        return self.answer is not None and self.answer.waiting

    def give(self, reply: Reply) -> None:
        """Reply to the caller if it waits."""
        if self.answer is not None:
            self.answer.give(reply)

    def withdrawal(self, *, unclaimed: bool = False) -> ReleaseLock:
        """Return the request that withdraws this attempt. `unclaimed`: the caller may repeat it at another manager."""
        return ReleaseLock(self.request.name, self.request.ticket, abandon=not unclaimed, unclaimed=unclaimed)


class LockQueue(Struct, eq=False):
    """The waiters of one lock by ticket, in the order of their arrival."""

    waiters: dict[str, Waiter] = {}
    owner: str = ""
    ends_at: float = 0.0  # End of the lease of `owner`, if known.
    overdue: bool = False  # The lease has ended and no new holder is known, so queue positions may be lost.
    pause: float = 0.0  # Seconds between two requests to a store without a queue.


def check_lock_request(request: AcquireLock | RenewLock | ReleaseLock | DescribeLock) -> None:
    """Validate a request, which may come from another program on the bus. Raises `BadMessage` or `CacheKeyError`."""
    if not request.name:
        raise CacheKeyError("the name of a lock must not be empty")
    if not _is_text(request.name):
        raise CacheKeyError("the name of a lock must be valid Unicode", ascii(request.name)[:60])
    if isinstance(request, DescribeLock):
        return
    if not 0 < len(request.ticket) <= 255 or "|" in request.ticket or not request.ticket.isprintable():
        raise BadMessage("the ticket of a lock must have 1 to 255 printable characters, without '|'")
    if isinstance(request, ReleaseLock):
        return
    if not 0 < request.ttl <= MAX_SECONDS:
        raise BadMessage(f"ttl must be a positive number of seconds, at most 1e9, not {request.ttl!r}")
    if isinstance(request, AcquireLock):
        if not 0 <= request.wait <= MAX_SECONDS:
            raise BadMessage(f"wait must be a number of seconds from 0 to 1e9, not {request.wait!r}")
        if not _is_text(request.owner):
            raise BadMessage("the owner of a lock must be valid Unicode")


def _is_text(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False
