"""What stands in a Redis string: a header of the server's making, and the value as bytes.

    8 bytes   version   big-endian double: microseconds of the server's clock at the write, or one more than before
    8 bytes   expiry    big-endian double: Unix time of the server in milliseconds, 0 for none
    1 byte    form      B bytes as they are, I decimal int, M msgpack; small letters are another layout: l is a lease
                        (`redis_leases`), t an entry with tags (`redis_tags`), o a loaded one
    rest      value

The expiry stands there as well as in Redis, so that reading a value with its time to live is one command.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from cachebus.messages import (
    CacheCapacityError,
    CacheError,
    CacheSerializationError,
    Failed,
    Found,
    Loaded,
    LoadMetadata,
    Missing,
)

from .durations import time_to_live
from .forms import BYTES, decode_form, encode_form, pack_plain, unpack_plain

HEADER = struct.Struct(">dd")
VALUE_AT = HEADER.size + 1
VALUE_MAX = 512 * 2**20 - VALUE_AT
"""The bytes of a value at most: a Redis string has 512 MiB (`proto-max-bulk-len`)."""

MISSING = Missing()

LEASE, LOADED, TAGGED = b"lot"


class HasTags(Exception):
    """Raised when an entry has tags, so that its bytes alone do not say whether it is valid."""


_unpack_header: Callable[[bytes], tuple[float, float]] = HEADER.unpack_from


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


def read_or_fail(raw: bytes, now: float, *, live: bool = False) -> Found | Missing | Failed:
    """The entry as a reply. `now` is the server's Unix time in seconds, as we know it; an entry that is `live` is live to
    the server. Raises `HasTags`."""
    # The hot path: the commonest form first.
    value: Any
    if len(raw) > 16 and raw[16] == BYTES:
        value = raw[17:]
    else:
        try:
            if len(raw) > 16 and raw[16] in (LEASE, LOADED, TAGGED):
                if raw[16] == TAGGED:
                    raise HasTags
                return MISSING if raw[16] == LEASE else read_loaded(raw, now, live=live) or MISSING
            value = decode(raw)
        except CacheError as error:
            return Failed.of(error)
    version, expiry = _unpack_header(raw)
    return Found(value, version, left(expiry, now) if expiry else None, (), version * 1e-6)


def read_run(raws: Iterable[Any], now: float) -> list[Found | Missing | Failed]:
    """The entries as replies, each read alone. Raises `HasTags`."""
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
            add(read_or_fail(raw, now))
    return replies


def left(expiry: float, now: float) -> float:
    """Seconds until an expiry in milliseconds. Redis had the value, so there is something left whatever we think."""
    return max(expiry * 1e-3 - now, 0.001)


def _milliseconds(ttl: float | None) -> str:
    """A time to live as Redis takes it; `""` is for ever. Raises `BadMessage` as `time_to_live` does."""
    return "" if ttl is None else str(math.ceil(time_to_live(ttl) * 1000))


milliseconds: Callable[[float | None], str] = lru_cache(256)(_milliseconds)


_LENGTH = struct.Struct(">H")


def pack_metadata(origin: LoadMetadata, lifetime: float | None) -> bytes:
    """What stands before the form and the value of a loaded entry: the form `o`, a length, and the origin as msgpack."""
    head = pack_plain([origin.load_time, origin.stale_for, origin.etag, lifetime])
    return b"o" + _LENGTH.pack(len(head)) + head


def split_metadata(raw: bytes) -> tuple[LoadMetadata, float | None, bytes]:
    """The origin of a loaded entry, the time to live that it was given, and the entry without its origin. Raises
    `CacheSerializationError`."""
    begin = VALUE_AT + _LENGTH.size
    try:
        end = begin + _LENGTH.unpack_from(raw, VALUE_AT)[0]
        load_time, stale_for, etag, lifetime = unpack_plain(raw[begin:end])
    except (struct.error, ValueError, TypeError):
        raise CacheSerializationError("the stored value is damaged") from None
    numbers = (load_time, stale_for, 0.0 if lifetime is None else lifetime)
    if not (all(type(each) in (float, int) for each in numbers) and (etag is None or type(etag) is str)):
        raise CacheSerializationError("the stored value is damaged")
    return LoadMetadata(load_time, stale_for, etag), lifetime, raw[: HEADER.size] + raw[end:]


def read_loaded(raw: bytes, now: float, *, live: bool) -> Found | None:
    """A loaded value with its origin; `None` if its time is up."""
    version, expiry = HEADER.unpack_from(raw)
    if not live and expiry and expiry * 1e-3 <= now:
        return None
    origin, lifetime, plain = split_metadata(raw)
    ttl = left(expiry, now) if expiry else None
    stored_at = version * 1e-6
    load_time, stale_for, etag = origin.load_time, origin.stale_for, origin.etag
    return Loaded(decode(plain), version, ttl, (), stored_at, load_time, stale_for, etag, lifetime)
