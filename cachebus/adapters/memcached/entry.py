"""The binary format of a Memcached item.

    1 byte    type tag   B raw bytes, I decimal int, M MessagePack, C chunked (see `values.py`); lower case for other
                         layouts: o with metadata (below), l a lease (see `lookup.py`)
    2 bytes   key size   big-endian; 0 if the item name contains the key itself
    8 bytes   expiry     big-endian double: Unix time of the server in seconds, 0 for none
    8 bytes   stored at  big-endian double: Unix time of the server in seconds
    8 bytes   version    big-endian double: 0, or the version that a touch has preserved
    key size  key        the key whose hash is in the item name; a key above 1024 bytes is replaced by a second hash
    rest      value      for `o`: the size of the metadata (4 bytes, big-endian), the metadata as MessagePack
                         [[load time, stale for, etag, lifetime] or nil, [[tag, generation], ...]], the type tag of the
                         value, and the value

The version of an entry is the start time of the server in microseconds plus the item's CAS token. So two writes never
have the same version, regardless of the clients' clocks. Malformed bytes raise `CacheSerializationError`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec

from cachebus.messages import (
    CacheError,
    CacheKeyError,
    CacheSerializationError,
    Failed,
    Found,
    Loaded,
    Missing,
    Present,
)

from ..common.encoding import BYTES, decode_form, unpack_plain
from ..common.validation import LONGEST
from .connection import store

HEADER = struct.Struct(">cHddd")
CHUNKED, WITH_METADATA = b"Co"
MISSING = Missing()
THIRTY_DAYS = 30 * 86_400
METADATA_MAX = 1 << 20
"""Maximum size in bytes of metadata."""

VERSION_MAX = 64
"""Maximum size in bytes of a tag's generation."""

_FAR = 1e18
"""Larger than any valid time or version."""
_LATEST = 2**31 - 1
"""The latest date that Memcached accepts; its times have 32 bits."""

_unpack_header: Callable[[bytes], tuple[bytes, int, float, float, float]] = HEADER.unpack_from
_HEADER_SIZE = HEADER.size
_SIZE = struct.Struct(">I")

T = TypeVar("T")

Number = Annotated[float, msgspec.Meta(ge=-1e300)]
"""A float that is not NaN."""

Instant = Annotated[float, msgspec.Meta(ge=0, lt=_FAR)]

TagVersion = tuple[str, Annotated[bytes, msgspec.Meta(max_length=VERSION_MAX)]]
"""A tag and its generation."""

TagVersions = tuple[TagVersion, ...]


class EntryLoad(msgspec.Struct, frozen=True, array_like=True):
    """The load metadata of a value. `lifetime` is its time to live in seconds, or `None` if it does not expire."""

    load_time: Number
    stale_for: Number
    etag: str | None
    lifetime: Number | None


class EntryMetadata(msgspec.Struct, frozen=True, array_like=True):
    """The metadata of an entry: load metadata and tags."""

    load: EntryLoad | None = None
    tags: TagVersions = ()

    def packed(self) -> bytes:
        """Return the encoded metadata with their type tag, as they precede the value."""
        packed = pack(self)
        return b"".join((b"o", _SIZE.pack(len(packed)), packed))


NO_METADATA = EntryMetadata()


@dataclass(slots=True, eq=False)
class Entry:
    """A decoded item. `version` is the version that callers see."""

    form: int
    expiry: float
    stored_at: float
    version: float
    body: memoryview
    metadata: EntryMetadata = NO_METADATA

    def left(self, now: float) -> float | None:
        """Return the remaining time to live in seconds, or `None` if the entry does not expire."""
        return self.expiry - now if self.expiry else None

    def present(self, now: float) -> Present:
        return Present(self.version, self.left(now))

    def packed(self, kept: bytes) -> bytes:
        """Return the encoded entry with its version, for storing it in a lease or restoring it."""
        form = bytes((self.form,)) + self.body
        return pack_entry(form, kept, self.expiry, self.stored_at, self.version, self.metadata)

    def put_back(self, name: str, kept: bytes, now: float, condition: bytes) -> bytes:
        """Return the command that stores the entry again with its version."""
        return store(name, self.packed(kept), server_expiry(kept_until(self.expiry, self.metadata), now), condition)


def pack_entry(
    form_and_body: bytes,
    kept: bytes,
    expiry: float,
    now: float,
    version: float = 0.0,
    metadata: EntryMetadata = NO_METADATA,
) -> bytes:
    """Return the bytes of an item."""
    if metadata is not NO_METADATA:
        form_and_body = metadata.packed() + form_and_body
    return HEADER.pack(form_and_body[:1], len(kept), expiry, now, version) + kept + form_and_body[1:]


def read_entry(raw: bytes, token: int, kept: bytes, epoch: float, now: float = 0.0) -> Entry | None:
    """Return the entry if it is live at `now` and its key matches, or `None`. Raises `CacheError`."""
    try:
        form, size, expiry, stored_at, version = _unpack_header(raw)
    except struct.error:
        raise _not_ours() from None
    start = _HEADER_SIZE + size
    if not (0.0 <= expiry < _FAR > stored_at >= 0.0 <= version < _FAR):
        raise _not_ours()
    if (expiry and expiry <= now) or raw[_HEADER_SIZE:start] != kept:
        return None
    entry = Entry(form[0], expiry, stored_at, version or epoch + token, memoryview(raw)[start:])
    if entry.form == WITH_METADATA:
        try:
            end = _SIZE.size + _SIZE.unpack_from(entry.body)[0]
            entry.metadata = unpack(entry.body[_SIZE.size : end], EntryMetadata)
            entry.form, entry.body = entry.body[end], entry.body[end + 1 :]
        except (struct.error, ValueError, IndexError):
            raise CacheSerializationError("the stored value is damaged") from None
    return entry


def found_or_fail(raw: bytes, token: int, kept: bytes, epoch: float, now: float) -> Found | Missing | Failed | Entry:
    """Return the reply to a read of an item. If the item is chunked or has tags, return its entry."""
    if not kept and len(raw) >= _HEADER_SIZE and raw[0] == BYTES:
        # The hot path: the most frequent type tag.
        _, size, expiry, stored_at, version = _unpack_header(raw)
        if not size and 0.0 <= expiry < _FAR > stored_at >= 0.0 <= version < _FAR:
            if expiry and expiry <= now:
                return MISSING
            return Found(raw[_HEADER_SIZE:], version or epoch + token, expiry - now if expiry else None, (), stored_at)
    try:
        entry = read_entry(raw, token, kept, epoch, now)
        if entry is None:
            return MISSING
        if entry.form == CHUNKED or entry.metadata.tags:
            return entry
        return found_of(entry, decode_form(entry.form, entry.body), now)
    except CacheError as error:
        return Failed.of(error)


def found_of(entry: Entry, value: Any, now: float) -> Found:
    """Return the reply with the decoded value of an entry."""
    metadata, left = entry.metadata, entry.left(now)
    tags = tuple([tag for tag, _ in metadata.tags])
    if (load := metadata.load) is None:
        return Found(value, entry.version, left, tags, entry.stored_at)
    load_time, stale_for, etag = load.load_time, load.stale_for, load.etag
    return Loaded(value, entry.version, left, tags, entry.stored_at, load_time, stale_for, etag, load.lifetime)


def kept_until(expiry: float, metadata: EntryMetadata) -> float:
    """Return the time at which the server may drop an entry; 0 means never. A stale entry is kept beyond its expiry."""
    load = metadata.load
    return expiry if load is None or not expiry else expiry + min(max(0.0, load.stale_for), LONGEST)


def server_expiry(expiry: float, now: float) -> int:
    """Return the expiry for Memcached, so that it does not drop an entry before its expiry.

    Memcached counts whole seconds and drops an item when the count is reached, so one second is added. It interprets
    more than 30 days as a date, so a date is passed then. A date beyond its range means no expiry in the server;
    readers still check the entry's own expiry.
    """
    if not expiry:
        return 0
    left = max(math.ceil(expiry - now), 0) + 1
    if left <= THIRTY_DAYS:
        return left
    date = math.ceil(expiry) + 1
    return date if date <= _LATEST else 0


# Packing of metadata and leases


def pack(value: msgspec.Struct) -> bytes:
    """Pack a struct that contains tags. Raises `CacheKeyError` if a tag is not valid Unicode."""
    try:
        return msgspec.msgpack.encode(value)
    except UnicodeEncodeError as error:
        raise CacheKeyError("a tag must be valid Unicode", ascii(error.object)[:60]) from None


def unpack(packed: memoryview, kind: type[T]) -> T:
    """Unpack a struct packed by `pack`. Raises `ValueError`."""
    if len(packed) > METADATA_MAX:
        raise ValueError("the metadata are too large")
    return msgspec.convert(unpack_plain(bytes(packed)), kind, builtin_types=(bytes,))


def _not_ours() -> CacheError:
    return CacheSerializationError("the stored value was not written by cachebus")
