"""What stands in a Redis string: a header of the server's making, and the value as bytes.

    8 bytes   version   big-endian double: microseconds of the server's clock at the write, or one more than before
    8 bytes   expiry    big-endian double: Unix time of the server in milliseconds, 0 for none
    1 byte    form      B bytes as they are, I decimal int, M msgpack; small letters are another layout: l is a lease
                        (`redis_leases`), t an entry with tags (`redis_scripts`), o a loaded one
    rest      value

The expiry stands there as well as in Redis, so that reading a value with its time to live is one command.

A namespace has one *sequence* for its tags: a random epoch and a number that each invalidation makes larger. A tag has a
*counter*: the epoch, and the number at its last invalidation. An entry with tags has a *stamp*: epoch and number at the start
of its load. It is valid while each of its tags has a counter of the stamp's epoch that is not larger than the stamp.

So an invalidation is one command whatever the number of entries. A counter that is lost makes entries invalid. A sequence
that is lost begins with another epoch, by which nothing older is valid. How the sequence knows without a counter when a tag
was last invalidated, at most, is in `redis_scripts`.
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
VALUE_MAX = 512 * 2**20 - VALUE_AT  # The bytes of a value at most: a Redis string has 512 MiB (`proto-max-bulk-len`).
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
"""What a Redis server and a cluster can do."""

MISSING = Missing()

LEASE, LOADED, TAGGED = b"lot"

STAMP_BYTES = 16
NO_STAMP = bytes(STAMP_BYTES)
"""Of a load that began when its namespace had no sequence: nothing with tags may come of it."""

MOST_HINTS = 16_384  # The keys whose tags a store remembers at most.
_METADATA_LENGTH = struct.Struct(">H")
_TAGS_LENGTH = struct.Struct(">I")
_unpack_header: Callable[[bytes], tuple[float, float]] = HEADER.unpack_from


class HasTags(Exception):
    """Raised when an entry has tags, so that its bytes alone do not say whether it is valid."""


class TagStamp(NamedTuple):
    """That none of some tags was invalidated since a stamp was taken."""

    stamp: bytes
    tags: tuple[str, ...]

    def holds(self, counters: Mapping[str, bytes | None]) -> bool:
        """Whether it is so, by the counters of the tags."""
        for tag in self.tags:
            counter = counters[tag]
            # Doubles above zero are in the order of their bytes.
            if counter is None or counter[:8] != self.stamp[:8] or counter > self.stamp:
                return False
        return True

    def verdict(self, holds: bool) -> bytes:
        """The argument for a script that cannot read the counters itself."""
        return (b"+" if holds else b"-") + self.stamp + pack_tags(self.tags)


# Values


def encode(value: Any) -> bytes:
    """The form byte and the value. Raises `CacheSerializationError` for a type that would not come back as it went,
    and `CacheCapacityError` for what Redis cannot hold."""
    body = encode_form(value)
    if len(body) > VALUE_MAX:
        raise CacheCapacityError("the value is too large for Redis", len(body) - 1, VALUE_MAX)
    return body


def decode(raw: bytes) -> Any:
    """The value of an entry. Raises `CacheSerializationError` for bytes that are no entry."""
    if len(raw) <= HEADER.size:
        return decode_form(0, b"")
    return decode_form(raw[HEADER.size], memoryview(raw)[VALUE_AT:])


def read_run(raws: Iterable[Any], now: float) -> list[Found | Missing | Failed]:
    """The entries as replies, each read alone. `now` is the server's Unix time in seconds. Raises `HasTags`."""
    replies: list[Found | Missing | Failed] = []
    add = replies.append
    for raw in raws:
        if raw is None:
            add(MISSING)
        elif len(raw) > 16 and raw[16] == BYTES:  # The commonest, and no call.
            version, expiry = _unpack_header(raw)
            ttl = None if not expiry else max(expiry * 1e-3 - now, 0.001)
            add(Found(raw[17:], version, ttl, (), version * 1e-6))
        else:
            claim, reply = read_entry(raw, now)
            if claim is not None:
                raise HasTags
            add(reply)
    return replies


def read_entry(
    raw: bytes | None, now: float, *, live: bool = False
) -> tuple[TagStamp | None, Found | Missing | Failed]:
    """The claim that an entry with tags is valid by, and the reply that the entry is then. `now` is the server's Unix
    time in seconds, as we know it; an entry that is `live` is live to the server."""
    if raw is None:
        return None, MISSING
    claim: TagStamp | None = None
    try:
        form = raw[16] if len(raw) > 16 else 0
        if form == TAGGED:
            claim, raw = split_tagged(raw)
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
    return claim, found if claim is None else replace(found, tags=claim.tags)


def left(expiry: float, now: float) -> float:
    """Seconds until an expiry in milliseconds. Redis had the value, so there is something left whatever we think."""
    return max(expiry * 1e-3 - now, 0.001)


@lru_cache(256)
def milliseconds(ttl: float | None) -> str:
    """A time to live as Redis takes it; `""` is for ever. Raises `BadMessage` as `time_to_live` does."""
    return "" if ttl is None else str(math.ceil(time_to_live(ttl) * 1000))


def read_head(head: bytes, now: float) -> Present | Missing:
    """The reply for an entry that is valid, by its head: what stands before the value."""
    if claim_of(head) is not None:
        head = split_tagged(head)[1]
    if len(head) <= HEADER.size or head[HEADER.size] == LEASE:
        return MISSING
    version, expiry = _unpack_header(head)
    # Of what is loaded Redis does not say whether it is only kept to be served stale. Of all else it does, and our idea of its
    # clock may be ahead of it.
    if head[HEADER.size] == LOADED and expiry and expiry * 1e-3 <= now:
        return MISSING
    return Present(version, left(expiry, now) if expiry else None)


# Loaded entries


def pack_metadata(metadata: LoadMetadata, lifetime: float | None) -> bytes:
    """What stands before the form and the value of a loaded entry: the form `o`, a length, and the metadata as msgpack."""
    head = pack_plain([metadata.load_time, metadata.stale_for, metadata.etag, lifetime])
    return b"o" + _METADATA_LENGTH.pack(len(head)) + head


def split_metadata(raw: bytes) -> tuple[LoadMetadata, float | None, bytes]:
    """The metadata of a loaded entry, the time to live that it was given, and the entry without its metadata. Raises
    `CacheSerializationError`."""
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
    """The reply for an entry that is served stale while `lease` is under way; `None` if there is none, or a damaged one."""
    if not raw:
        return None
    tags: tuple[str, ...] = ()
    try:
        if raw[16] == TAGGED:
            claim, raw = split_tagged(raw)
            tags = claim.tags
        metadata, _, plain = split_metadata(raw)
        value = decode(plain)
    except CacheSerializationError:
        return None
    version, _ = HEADER.unpack_from(raw)
    return Stale(value, version, tags, version * 1e-6, metadata.load_time, metadata.etag, lease, remaining)


# Entries with tags


def new_epoch() -> bytes:
    """An epoch that no entry has, and no stamp without one."""
    return b"\x01" + os.urandom(7)


def pack_tags(tags: Sequence[str]) -> bytes:
    """Tags as they stand in an entry, nothing for none. Raises `BadMessage` for what is no valid Unicode."""
    try:
        return pack_plain(list(tags)) if tags else b""
    except UnicodeEncodeError:
        raise BadMessage("a tag must be valid Unicode") from None


def pack_tagged(body: bytes, tags: Sequence[str], stamp: bytes) -> bytes:
    """What stands behind the header of an entry with tags; `body` is its form and value."""
    packed = pack_tags(tags)
    return b"".join((b"t", _TAGS_LENGTH.pack(len(packed)), stamp, packed, body))


def split_tagged(raw: bytes) -> tuple[TagStamp, bytes]:
    """The claim that an entry with tags is valid by, and the entry without tags. Raises `CacheSerializationError`."""
    begin = VALUE_AT + _TAGS_LENGTH.size + STAMP_BYTES
    try:
        end = begin + _TAGS_LENGTH.unpack_from(raw, VALUE_AT)[0]
        tags = tuple(unpack_plain(raw[begin:end]))
    except (struct.error, ValueError, TypeError):
        raise CacheSerializationError("the stored value is damaged") from None
    if end > len(raw) or not all(isinstance(tag, str) for tag in tags):
        raise CacheSerializationError("the stored value is damaged")
    return TagStamp(raw[begin - STAMP_BYTES : begin], tags), raw[: HEADER.size] + raw[end:]


def claim_of(raw: bytes) -> TagStamp | None:
    """The claim that an entry, or its head, is valid by if it has tags. Raises `CacheSerializationError`."""
    return split_tagged(raw)[0] if len(raw) > HEADER.size and raw[HEADER.size] == TAGGED else None


@dataclass(slots=True)
class TagSpace:
    """The tags of a namespace, as a store sees them: the names of their keys, and which key had which tags.

    `here` says that scripts read the counters themselves, `seen` that the namespace has tags as far as this store knows.
    All names are in one slot of a cluster.
    """

    namespace: str
    here: bool
    seen: bool = False
    hints: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """The tags that a key had the last time."""

    def new_stamp(self, tags: Sequence[str]) -> bytes:
        """The 16 bytes that a request with tags begins with if scripts read the counters: an epoch for a sequence that is
        not there."""
        self.seen = self.seen or bool(tags)
        return new_epoch() + NO_STAMP[8:]

    @property
    def sequence(self) -> str:
        """The key of the sequence."""
        return f"{self.namespace}#tags:{{{self.namespace}}}"

    def counter(self, tag: str) -> str:
        """The key of a tag's counter."""
        return f"{self.sequence}:{tag}"

    def learn(self, key: str, tags: tuple[str, ...]) -> None:
        """Remember the tags of a key, so that their counters are asked for with it."""
        self.seen = True
        if not self.here:
            if key not in self.hints and len(self.hints) >= MOST_HINTS:
                del self.hints[next(iter(self.hints))]
            self.hints[key] = tags
