"""Encoding of values for stores of bytes: bytes unchanged, 64-bit integers as digits, other values as msgpack.

A one-letter type tag, stored with the value, identifies the encoding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import msgpack  # type: ignore[import-untyped]

from cachebus.messages import CacheSerializationError

BYTES, INT, MSGPACK = b"BIM"

# msgpack comes without type hints.
_packb: Callable[..., bytes] = msgpack.packb  # pyright: ignore[reportUnknownMemberType, reportAssignmentType, reportUnknownVariableType]
_Unpacker: Any = msgpack.Unpacker  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
_unpackb: Callable[..., Any] = msgpack.unpackb  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


LARGE_ARRAY = 1024
"""Maximum array length that is read in one pass. msgpack allocates as many items as an array declares."""


def encode_form(value: Any) -> bytes:
    """Return the type tag followed by the encoded value. Raises `CacheSerializationError` for an unsupported type."""
    kind = cast("type[object]", type(value))
    if kind is bytes:
        body: bytes = b"B" + value
        return body
    if kind is int and -(2**63) <= value < 2**63:
        return b"I%d" % value
    if kind is bytearray or kind is memoryview:
        _refuse(value)
    try:
        return b"M" + _packb(value, strict_types=True, default=_refuse)
    except OverflowError:
        raise CacheSerializationError("cannot store an int of more than 64 bits") from None
    except (TypeError, ValueError) as error:
        raise CacheSerializationError(f"cannot store a {kind.__name__}: {error}") from None


def decode_form(form: int, body: bytes | memoryview) -> Any:
    """Decode a value by its type tag. Raises `CacheSerializationError` for an unknown tag or a damaged value."""
    try:
        if form == BYTES:
            return bytes(body)
        if form == MSGPACK:
            return _unpacked(body)
        if form == INT:
            return int(bytes(body))
    except (ValueError, TypeError, msgpack.UnpackException):
        raise CacheSerializationError("the stored value is damaged") from None
    raise CacheSerializationError("the stored value was not written by cachebus, or by a newer version")


def pack_plain(value: Any) -> bytes:
    """Encode a store's internal data as msgpack."""
    return _packb(value)


def unpack_plain(packed: bytes) -> Any:
    """Decode data written by `pack_plain`. Raises `ValueError` for other data."""
    try:
        return _unpacked(packed)
    except msgpack.UnpackException as error:
        raise ValueError(str(error)) from None


def _unpacked(packed: bytes | memoryview) -> Any:
    """Decode untrusted msgpack. Forged data cannot use more memory than genuine values of the same size."""
    size = len(packed)
    limit = min(size, LARGE_ARRAY)
    bounds = {"max_str_len": size, "max_bin_len": size, "max_ext_len": size, "max_map_len": size // 2}
    try:
        return _unpackb(packed, strict_map_key=False, max_array_len=limit, **bounds)
    except ValueError as error:
        if "max_array_len" not in str(error):
            raise
    # Check that all items exist before msgpack allocates memory for them.
    unpacker: Any = _Unpacker(max_buffer_size=size + 1, strict_map_key=False)
    unpacker.feed(packed)
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        raise ValueError("the value is truncated") from None
    return _unpackb(packed, strict_map_key=False, max_array_len=size, **bounds)


def _refuse(value: Any) -> NoReturn:
    raise CacheSerializationError(
        f"cannot store a {type(value).__name__}:"
        " expected bytes, str, int, float, bool, None, or lists and dicts of these"
    )
