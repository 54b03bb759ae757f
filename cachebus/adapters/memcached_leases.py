"""Leases in Memcached: the lease of a key stands under the key itself, so that whatever removes or writes the key, or gives
the namespace another generation, revokes the lease.

In the place of a missing value, or of one whose time is up, stands an entry of the form `l`, whose expiry has always been
over, so that every reader finds no value. It holds, as msgpack:

    token       of the lease: what was asked for, a dot and a nonce
    deadline    of the lease: Unix time of the server in seconds
    version     of the live value that is being refreshed; 0 in the place of a value
    all tags    the generation that all tags had when the lease was granted
    tags        the tags that were known then, with their generations
    stale       the entry whose time is up, as it was, with its version; empty without one
    failed      the name of the last lease here whose loader has failed, and the name of the error; empty without one

A lease whose loader has failed is left for `FAILURE_SHOWN` seconds, with the deadline 0, for those that wait for the load:
Memcached has no notifications.

A live value that is being refreshed stays where it is. Its lease is an item of its own, with the version of that value in
it.

The deadline is by the server's clock, as each client knows it. Only the number of loads depends on it: a value is stored
over the very item that was looked at, by its CAS token, so that a lease that another client has taken over, too soon or
not, stores nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cachebus.messages import CacheError, Stale

from .memcached_entry import (
    Entry,
    TagVersions,
    number,
    pack_entry,
    pack_tagged,
    read_entry,
    tag_versions,
    unpack_tagged,
)

T = TypeVar("T")

LEASE = b"l"[0]
_OVER = 1.0
"""An expiry that is over for every reader, whatever its clock says."""
FAILURE_SHOWN = 5.0
"""Seconds for which a loader's failure is shown: many times as long as a waiter pauses between two questions."""


@dataclass(frozen=True, slots=True)
class Held:
    """A lease as it stands in the server."""

    token: str
    deadline: float
    version: float
    all_tags: bytes
    tags: TagVersions
    stale: bytes = b""
    failed: tuple[str, str] = ("", "")

    @property
    def ended(self) -> bool:
        """Whether its loader has failed, so that it is free."""
        return not self.deadline

    def until(self, deadline: float) -> Held:
        """Return the same lease with another deadline."""
        return replace(self, deadline=deadline)

    def with_error(self, error: str) -> Held:
        """Return the same lease, ended by the exception of its loader."""
        return replace(self, deadline=0.0, failed=(self.token, error))

    def pack(self, kept: bytes, stale: bytes) -> bytes:
        """Return the bytes of its item, over that stale entry."""
        tags = [list(each) for each in self.tags]
        body = [self.token, self.deadline, self.version, self.all_tags, tags, stale, list(self.failed)]
        return pack_entry(b"l" + pack_tagged(body), kept, _OVER, 0.0)


def held_of(entry: Entry | None) -> Held | None:
    """Return the lease that an entry holds; `None` if it is none, or damaged, and so free."""
    if entry is None or entry.form != LEASE:
        return None
    try:
        token, deadline, version, all_tags, tags, stale, (name, error) = unpack_tagged(bytes(entry.body))
        return Held(
            _checked(str, token),
            number(deadline),
            number(version),
            _checked(bytes, all_tags),
            tag_versions(tags),
            _checked(bytes, stale),
            (_checked(str, name), _checked(str, error)),
        )
    except (ValueError, TypeError):
        return None


def stale_in(held: Held, kept: bytes) -> Entry | None:
    """Return the stale entry in a lease; `None` if there is none, or if it is damaged."""
    try:
        return read_entry(held.stale, 0, kept, 0.0) if held.stale else None
    except CacheError:
        return None


def servable(entry: Entry | None, now: float) -> bool:
    """Return whether the value of an entry may be served, live or stale, as far as its time goes."""
    if entry is None or entry.form == LEASE:
        return False
    return not entry.expiry or entry.kept_until() > now


def stale_of(entry: Entry, value: object, lease: str, remaining: float) -> Stale:
    """Return the reply that says what may be served stale."""
    load = entry.metadata.load
    tags = tuple([tag for tag, _ in entry.metadata.tags])
    load_time, etag = (0.0, None) if load is None else (load.load_time, load.etag)
    return Stale(value, entry.version, tags, entry.stored_at, load_time, etag, lease, remaining)


def _checked(kind: type[T], value: Any) -> T:
    if value.__class__ is not kind:
        raise TypeError
    checked: T = value
    return checked
