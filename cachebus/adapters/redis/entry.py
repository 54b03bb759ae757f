"""Format of an entry in a Redis string: a header written by the server, and the value.

    8 bytes   version   big-endian double: microseconds of the server's clock at the write, or one more than before
    8 bytes   expiry    big-endian double: Unix time of the server in milliseconds, 0 for none
    1 byte    type tag  B raw bytes, I decimal int, M msgpack. Lower case marks another layout:
                        l a lease (see `leases`), t an entry with tags (see `scripts`), o a loaded entry
    rest      value

The header repeats the expiry that Redis keeps, so that one command reads a value and its time to live.

A namespace has one *sequence* for its tags: a random epoch, and a number that each invalidation increments. A tag has
a *counter*: the epoch, and the number at its last invalidation. An entry with tags has a *stamp*: the epoch and the
number at the start of its load. The entry is valid if each of its tags has a counter with the same epoch that is not
larger than the stamp.

An invalidation therefore takes one command, however many entries have the tag. If Redis loses a tag counter, its
entries become misses. If it loses the sequence, the new one gets a new epoch, and every older entry becomes a miss.
`scripts` describes how the sequence bounds the last invalidation of a tag whose counter was lost.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from msgspec.structs import replace

from cachebus.actors.ports import Capabilities
from cachebus.messages import (
    BadMessage,
    CacheCapacityError,
    CacheError,
    CacheSerializationError,
    Failed,
    Found,
    Loaded,
    LoadMetadata,
    Missing,
    Present,
    Stale,
)

from ..common.encoding import BYTES, decode_form, encode_form, pack_plain, unpack_plain
from ..common.validation import time_to_live

HEADER = struct.Struct(">dd")
VALUE_AT = HEADER.size + 1
VALUE_MAX = 512 * 2**20 - VALUE_AT  # Bytes. A Redis string has at most 512 MiB (`proto-max-bulk-len`).
CAPABILITIES = Capabilities(
    patterns=True,
    tags=True,
    compare_and_set=True,
    counters=True,
    leases=True,
    rate_limits=True,
    locks=True,
    max_value_bytes=VALUE_MAX,
)
"""Capabilities of a Redis server and of a cluster."""

MISSING = Missing()

LEASE, LOADED, TAGGED = b"lot"

STAMP_BYTES = 16
NO_STAMP = bytes(STAMP_BYTES)
"""Stamp of a load that began when its namespace had no sequence. Its value cannot be stored with tags."""

MAX_HINTS = 16_384  # Maximum number of keys whose tags a store remembers.
_METADATA_LENGTH = struct.Struct(">H")
_TAGS_LENGTH = struct.Struct(">I")
_unpack_header: Callable[[bytes], tuple[float, float]] = HEADER.unpack_from


class HasTags(Exception):
    """Raised when an entry has tags: its bytes alone do not show whether it is valid."""


class TagStamp(NamedTuple):
    """Stamp of an entry and its tags. It holds if no tag was invalidated after the stamp was taken."""

    stamp: bytes
    tags: tuple[str, ...]

    def holds(self, counters: Mapping[str, bytes | None]) -> bool:
        """Return `True` if the counters show no later invalidation."""
        for tag in self.tags:
            counter = counters[tag]
            # Big-endian positive doubles sort like their bytes.
            if counter is None or counter[:8] != self.stamp[:8] or counter > self.stamp:
                return False
        return True

    def verdict(self, holds: bool) -> bytes:
        """Encode the result for a script that cannot read the counters."""
        return (b"+" if holds else b"-") + self.stamp + pack_tags(self.tags)


# Values


def encode(value: Any) -> bytes:
    """Return the type tag and the encoded value.

    Raises `CacheSerializationError` if the type would not survive a round trip, and `CacheCapacityError` if the value
    is larger than a Redis string.
    """
    body = encode_form(value)
    if len(body) > VALUE_MAX:
        raise CacheCapacityError("the value is too large for Redis", len(body) - 1, VALUE_MAX)
    return body


def decode(raw: bytes) -> Any:
    """Decode the value of an entry. Raises `CacheSerializationError` if the bytes are not an entry."""
    if len(raw) <= HEADER.size:
        return decode_form(0, b"")
    return decode_form(raw[HEADER.size], memoryview(raw)[VALUE_AT:])


def read_run(raws: Iterable[Any], now: float) -> list[Found | Missing | Failed]:
    """Convert entries into replies; a damaged entry fails alone. Raises `HasTags`.

    `now` is the server's estimated Unix time in seconds.
    """
    replies: list[Found | Missing | Failed] = []
    add = replies.append
    for raw in raws:
        if raw is None:
            add(MISSING)
        elif len(raw) > 16 and raw[16] == BYTES:  # The most common type, without a function call.
            version, expiry = _unpack_header(raw)
            ttl = None if not expiry else max(expiry * 1e-3 - now, 0.001)
            add(Found(raw[17:], version, ttl, (), version * 1e-6))
        else:
            tag_stamp, reply = read_entry(raw, now)
            if tag_stamp is not None:
                raise HasTags
            add(reply)
    return replies


def read_entry(
    raw: bytes | None, now: float, *, live: bool = False
) -> tuple[TagStamp | None, Found | Missing | Failed]:
    """Return the stamp of an entry, or `None` without tags, and the reply to give if the stamp holds.

    `now` is the server's estimated Unix time in seconds. Pass `live` if the server has already checked the expiry.
    """
    if raw is None:
        return None, MISSING
    tag_stamp: TagStamp | None = None
    try:
        form = raw[16] if len(raw) > 16 else 0
        if form == TAGGED:
            tag_stamp, raw = split_tagged(raw)
            form = raw[16] if len(raw) > 16 else 0
            if form == TAGGED:
                raise CacheSerializationError("the stored value is damaged")
        if form == LEASE:
            return None, MISSING
        if form == LOADED:
            version, expiry = _unpack_header(raw)
            if not live and expiry and expiry * 1e-3 <= now:
                return None, MISSING
            load, lifetime, plain = split_metadata(raw)
            ttl, stored_at, value = left(expiry, now) if expiry else None, version * 1e-6, decode(plain)
            found: Found = Loaded(
                value, version, ttl, (), stored_at, load.load_time, load.stale_for, load.etag, lifetime
            )
        else:
            value = raw[17:] if form == BYTES else decode(raw)
            version, expiry = _unpack_header(raw)
            found = Found(value, version, left(expiry, now) if expiry else None, (), version * 1e-6)
    except CacheError as error:
        return None, Failed.of(error)
    return tag_stamp, found if tag_stamp is None else replace(found, tags=tag_stamp.tags)


def left(expiry: float, now: float) -> float:
    """Return the seconds until an expiry in milliseconds; positive, because Redis still had the value."""
    return max(expiry * 1e-3 - now, 0.001)


@lru_cache(256)
def milliseconds(ttl: float | None) -> str:
    """Return a time to live in milliseconds as text; `""` means no expiry. Raises `BadMessage` if it is not valid."""
    return "" if ttl is None else str(math.ceil(time_to_live(ttl) * 1000))


def read_head(head: bytes, now: float) -> Present | Missing:
    """Return the reply for a valid entry, given its head: the bytes before the value."""
    if tag_stamp_of(head) is not None:
        head = split_tagged(head)[1]
    if len(head) <= HEADER.size or head[HEADER.size] == LEASE:
        return MISSING
    version, expiry = _unpack_header(head)
    # Redis keeps a loaded entry past its expiry, to serve it stale. For other entries the expiry is not compared: Redis
    # has removed the expired ones, and `now` may be ahead of its clock.
    if head[HEADER.size] == LOADED and expiry and expiry * 1e-3 <= now:
        return MISSING
    return Present(version, left(expiry, now) if expiry else None)


# Loaded entries


def pack_metadata(metadata: LoadMetadata, lifetime: float | None) -> bytes:
    """Encode the metadata that precedes a loaded value: the type tag `o`, a length, and msgpack."""
    head = pack_plain([metadata.load_time, metadata.stale_for, metadata.etag, lifetime])
    return b"o" + _METADATA_LENGTH.pack(len(head)) + head


def split_metadata(raw: bytes) -> tuple[LoadMetadata, float | None, bytes]:
    """Return the metadata of a loaded entry, its original time to live, and the entry without the metadata.

    Raises `CacheSerializationError`.
    """
    begin = VALUE_AT + _METADATA_LENGTH.size
    try:
        end = begin + _METADATA_LENGTH.unpack_from(raw, VALUE_AT)[0]
        load_time, stale_for, etag, lifetime = unpack_plain(raw[begin:end])
    except (struct.error, ValueError, TypeError):
        raise CacheSerializationError("the stored value is damaged") from None
    numbers = (load_time, stale_for, 0.0 if lifetime is None else lifetime)
    if not (all(type(each) in (float, int) for each in numbers) and (etag is None or type(etag) is str)):
        raise CacheSerializationError("the stored value is damaged")
    return LoadMetadata(load_time, stale_for, etag), lifetime, raw[: HEADER.size] + raw[end:]


def read_stale(raw: bytes, lease: str, remaining: float) -> Stale | None:
    """Return the reply for an entry served stale while `lease` runs; `None` if it is missing or damaged."""
    if not raw:
        return None
    tags: tuple[str, ...] = ()
    try:
        if raw[16] == TAGGED:
            tag_stamp, raw = split_tagged(raw)
            tags = tag_stamp.tags
        metadata, _, plain = split_metadata(raw)
        value = decode(plain)
    except CacheSerializationError:
        return None
    version, _ = HEADER.unpack_from(raw)
    return Stale(value, version, tags, version * 1e-6, metadata.load_time, metadata.etag, lease, remaining)


# Entries with tags


def new_epoch() -> bytes:
    """Create a random epoch. It differs from that of `NO_STAMP`."""
    return b"\x01" + os.urandom(7)


def pack_tags(tags: Sequence[str]) -> bytes:
    """Encode tags as stored in an entry; no tags are empty bytes. Raises `BadMessage` for invalid Unicode."""
    try:
        return pack_plain(list(tags)) if tags else b""
    except UnicodeEncodeError:
        raise BadMessage("a tag must be valid Unicode") from None


def pack_tagged(body: bytes, tags: Sequence[str], stamp: bytes) -> bytes:
    """Encode an entry with tags after its header. `body` is the type tag and the value."""
    packed = pack_tags(tags)
    return b"".join((b"t", _TAGS_LENGTH.pack(len(packed)), stamp, packed, body))


def split_tagged(raw: bytes) -> tuple[TagStamp, bytes]:
    """Return the stamp and tags of an entry, and the entry without them. Raises `CacheSerializationError`."""
    begin = VALUE_AT + _TAGS_LENGTH.size + STAMP_BYTES
    try:
        end = begin + _TAGS_LENGTH.unpack_from(raw, VALUE_AT)[0]
        tags = tuple(unpack_plain(raw[begin:end]))
    except (struct.error, ValueError, TypeError):
        raise CacheSerializationError("the stored value is damaged") from None
    if end > len(raw) or not all(isinstance(tag, str) for tag in tags):
        raise CacheSerializationError("the stored value is damaged")
    return TagStamp(raw[begin - STAMP_BYTES : begin], tags), raw[: HEADER.size] + raw[end:]


def tag_stamp_of(raw: bytes) -> TagStamp | None:
    """Return the stamp of an entry or its head; `None` without tags. Raises `CacheSerializationError`."""
    return split_tagged(raw)[0] if len(raw) > HEADER.size and raw[HEADER.size] == TAGGED else None


@dataclass(slots=True)
class TagSpace:
    """Tags of a namespace: the names of their keys in Redis, and the last known tags of each cache key.

    `here` is true if scripts can read the counters. `seen` is true if this store knows that the namespace uses tags. In
    a cluster, the sequence and all counters are in one slot.
    """

    namespace: str
    here: bool
    seen: bool = False
    hints: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Tags that a key had when it was last read. Used only in a cluster."""

    def new_stamp(self, tags: Sequence[str]) -> bytes:
        """Return the 16 bytes that a script with counters needs: the epoch to use if the sequence is missing."""
        self.seen = self.seen or bool(tags)
        return new_epoch() + NO_STAMP[8:]

    @property
    def sequence(self) -> str:
        """Name of the sequence's key."""
        return f"{self.namespace}#tags:{{{self.namespace}}}"

    def counter(self, tag: str) -> str:
        """Return the name of a counter's key."""
        return f"{self.sequence}:{tag}"

    def learn(self, key: str, tags: tuple[str, ...]) -> None:
        """Remember the tags of a key, so that the next read requests their counters with it."""
        self.seen = True
        if not self.here:
            if key not in self.hints and len(self.hints) >= MAX_HINTS:
                del self.hints[next(iter(self.hints))]
            self.hints[key] = tags
