"""What a lock manager refuses: requests that no facade of ours sends, but others on the bus may."""

from __future__ import annotations

from cachebus.messages import AcquireLock, BadMessage, CacheKeyError, DescribeLock, ReleaseLock, RenewLock

LONGEST = 1e9
"""Seconds that a lock may be held or waited for: thirty years."""


def check_lock_request(request: AcquireLock | RenewLock | ReleaseLock | DescribeLock) -> None:
    """Raise `BadMessage`, or `CacheKeyError` for a name."""
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
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
