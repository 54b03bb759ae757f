"""What stands in a Memcached item, and what it says.

    1 byte    form       B bytes as they are, I decimal int, M msgpack, C chunked (see `memcached_chunks`); small letters
                         are another layout: o with notes (see `memcached_notes`), l a lease (see `memcached_leases`)
    2 bytes   key size   big-endian; 0 where the name on the wire is the key itself
    8 bytes   expiry     big-endian double: Unix time of the server in seconds, 0 for none
    8 bytes   stored at  big-endian double: Unix time of the server in seconds
    8 bytes   version    big-endian double: 0, or the version that a touch has kept
    key size  key        what the hash on the wire stands for; a longer one than 1024 bytes is hashed once more
    rest      value

The version of an entry is the second at which the server was started, in microseconds, plus the item's CAS token: both
are the server's, so no two writes ever share one, whoever's clock is wrong.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from cachebus.messages import CacheError, CacheSerializationError, Failed, Found, Loaded, Missing, Present

from .durations import time_to_live
from .forms import BYTES, decode_form
from .memcached_notes import NO_NOTES, NOTED, Notes, pack_noted, split_noted

HEADER = struct.Struct(">cHddd")
CHUNKED = b"C"[0]
MISSING = Missing()
THIRTY_DAYS = 30 * 86_400
_LATEST = 2**31 - 1
"""Memcached reads times as 32 bits."""

_unpack_header: Callable[[bytes], tuple[bytes, int, float, float, float]] = HEADER.unpack_from
_HEADER_SIZE = HEADER.size
_B = b"B"


class Entry:
    """An item of ours, taken apart. `token` is its CAS token, `version` what callers know of it."""

    __slots__ = ("body", "expiry", "form", "notes", "stored_at", "token", "version")

    def __init__(
        self, form: int, expiry: float, stored_at: float, version: float, body: memoryview, token: int
    ) -> None:
        self.notes = NO_NOTES
        if form == NOTED:
            self.notes, form, body = split_noted(body)
        self.form = form
        self.expiry = expiry
        self.stored_at = stored_at
        self.version = version
        self.body = body
        self.token = token

    def left(self, now: float) -> float | None:
        """Seconds to live, `None` without expiry."""
        return self.expiry - now if self.expiry else None

    def present(self, now: float) -> Present:
        return Present(self.version, self.left(now))


def pack_entry(
    form_and_body: bytes, kept: bytes, expiry: float, now: float, version: float = 0.0, notes: Notes = NO_NOTES
) -> bytes:
    """The bytes of an item."""
    if notes is not NO_NOTES:
        form_and_body = pack_noted(notes, form_and_body)
    return b"".join(
        (HEADER.pack(form_and_body[:1], len(kept), expiry, now, version), kept, memoryview(form_and_body)[1:])
    )


def read_entry(raw: bytes, token: int, kept: bytes, epoch: float, now: float) -> Entry | None:
    """The live entry of a key; `None` where its time is up, and where it is another key's with the same hash.

    Raises `CacheSerializationError` for what was not written by us.
    """
    form, size, expiry, stored_at, version = _header(raw)
    start = _HEADER_SIZE + size
    if (expiry and expiry <= now) or raw[_HEADER_SIZE:start] != kept:
        return None
    return Entry(form[0], expiry, stored_at, version or epoch + token, memoryview(raw)[start:], token)


def any_entry(raw: bytes, token: int, kept: bytes, epoch: float) -> Entry | None:
    """As `read_entry`, whether its time is up or not."""
    return read_entry(raw, token, kept, epoch, 0.0)


def _header(raw: bytes) -> tuple[bytes, int, float, float, float]:
    try:
        return _unpack_header(raw)
    except struct.error:
        raise CacheSerializationError("what is stored under the key was not written by cachebus") from None


def found_or_fail(raw: bytes, token: int, kept: bytes, epoch: float, now: float) -> Found | Missing | Failed | Entry:
    """What an item says to whoever asked for its key. One that is chunked, or has tags, comes back as its entry."""
    if not kept and len(raw) >= _HEADER_SIZE and raw[0] == BYTES:
        # The hot path: the commonest form first.
        _, size, expiry, stored_at, version = _unpack_header(raw)
        if size or (expiry and expiry <= now):
            return MISSING
        ttl = expiry - now if expiry else None
        return Found(raw[_HEADER_SIZE:], version or epoch + token, ttl, (), stored_at)
    try:
        entry = read_entry(raw, token, kept, epoch, now)
        if entry is None:
            return MISSING
        if entry.form == CHUNKED or entry.notes.marks:
            return entry
        return found_of(entry, decode_form(entry.form, entry.body), now)
    except CacheError as error:
        return Failed.of(error)


def found_of(entry: Entry, value: Any, now: float) -> Found:
    """The reply that carries a value."""
    notes, left = entry.notes, entry.left(now)
    if (metadata := notes.metadata) is None:
        return Found(value, entry.version, left, notes.tags, entry.stored_at)
    load_time, stale_for, etag = metadata.load_time, metadata.stale_for, metadata.etag
    return Loaded(value, entry.version, left, notes.tags, entry.stored_at, load_time, stale_for, etag, notes.lifetime)


def kept_until(expiry: float, notes: Notes) -> float:
    """When the server may forget an entry: after its time, if it may be served stale. 0 for never."""
    return expiry and expiry + notes.stale_for


def expiry_of(ttl: float | None, now: float) -> float:
    """The time at which an entry's time is up, for a time to live in seconds; 0 for none. Raises
    `BadMessage` as `time_to_live` does."""
    return 0.0 if ttl is None else now + math.ceil(time_to_live(ttl))


def server_expiry(expiry: float, now: float) -> int:
    """What Memcached is told, so that it forgets an entry once its time is up, and not before.

    It counts whole seconds and drops an item when the count is reached, so one is added. More than 30 days it would take
    for a date, so it is given one. What lies beyond its calendar is kept, and expires for its readers only.
    """
    if not expiry:
        return 0
    left = max(math.ceil(expiry - now), 0) + 1
    if left <= THIRTY_DAYS:
        return left
    date = math.ceil(expiry) + 1
    return date if date <= _LATEST else 0
