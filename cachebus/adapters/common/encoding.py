"""The forms in which stores of bytes keep a value: bytes as they are, 64-bit integers as digits, and msgpack for the
rest. A form is named by one letter, which the store keeps beside the value."""

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
"""msgpack makes room for as many items as an array claims to have. Up to here that is harmless."""


def encode_form(value: Any) -> bytes:
    """Return the form's letter and the value in it. Raises `CacheSerializationError` for a type that would be lost."""
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
        raise CacheSerializationError("an int of more than 64 bits cannot be stored") from None
    except (TypeError, ValueError) as error:
        raise CacheSerializationError(f"a {kind.__name__} cannot be stored: {error}") from None


def decode_form(form: int, body: bytes | memoryview) -> Any:
    """Return the value of a form. Raises `CacheSerializationError` for an unknown form, and for damage."""
    try:
        if form == BYTES:
            return bytes(body)
        if form == MSGPACK:
            return _unpacked(body)
        if form == INT:
            return int(bytes(body))
    except (ValueError, TypeError, msgpack.UnpackException):
        raise CacheSerializationError("the stored value is damaged") from None
    raise CacheSerializationError("what is stored under the key was not written by cachebus, or by a newer one")


def pack_plain(value: Any) -> bytes:
    """Return msgpack of what a store itself has put together."""
    return _packb(value)


def unpack_plain(packed: bytes) -> Any:
    """Return what `pack_plain` was given. Raises `ValueError` for anything else."""
    try:
        return _unpacked(packed)
    except msgpack.UnpackException as error:
        raise ValueError(str(error)) from None


def _unpacked(packed: bytes | memoryview) -> Any:
    """The value of msgpack that anyone may have written: it takes no more memory than values of that many bytes need."""
    size = len(packed)
    limit = min(size, LARGE_ARRAY)
    bounds = {"max_str_len": size, "max_bin_len": size, "max_ext_len": size, "max_map_len": size // 2}
    try:
        return _unpackb(packed, strict_map_key=False, max_array_len=limit, **bounds)
    except ValueError as error:
        if "max_array_len" not in str(error):
            raise
    # Seen to be there before there is room made for them.
    unpacker: Any = _Unpacker(max_buffer_size=size + 1, strict_map_key=False)
    unpacker.feed(packed)
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        raise ValueError("the value is cut short") from None
    return _unpackb(packed, strict_map_key=False, max_array_len=size, **bounds)


def _refuse(value: Any) -> NoReturn:
    raise CacheSerializationError(
        f"a {type(value).__name__} cannot be stored:"
        " only bytes, str, int, float, bool, None, and lists and dicts of these"
    )
