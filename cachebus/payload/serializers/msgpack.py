"""The serializer `msgpack`, with extension types for scalars and containers that msgpack lacks.

| code | type | content |
| --- | --- | --- |
| 1, 2, 3 | tuple, set, frozenset | empty: a marker before the items of the container, in an array |
| 4, 5, 6 | datetime, date, time | ISO 8601 text |
| 7 | timedelta | msgpack array: days, seconds, microseconds |
| 8 | UUID | 16 bytes |
| 9 | Decimal | text |
| 10 | int of more than 64 bits | big-endian two's complement |

The standard timestamp of msgpack (code -1) is read as a datetime in UTC, but never written.
"""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable, Mapping
from decimal import Decimal
from itertools import chain
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]

from cachebus.messages import CacheSerializationError

from .scalars import read_date, read_datetime, read_time, refuse, type_of, write_date, write_moment

# msgpack comes without type hints.
_packb: Callable[..., bytes] = msgpack.packb  # pyright: ignore[reportUnknownMemberType, reportAssignmentType, reportUnknownVariableType]
_unpackb: Callable[..., Any] = msgpack.unpackb  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
_Unpacker: Any = msgpack.Unpacker  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
_Packer: Any = msgpack.Packer  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
Ext: Any = msgpack.ExtType

_PACKED_MAX = 2**20
LARGE_ARRAY = 1024
"""Maximum array length that is read in one pass. msgpack allocates as many items as an array declares, so a larger
array is read only after a first pass has found its items.
"""

ContainerReader = Callable[[list[Any]], Any]

_SCALARS: tuple[tuple[type[Any], int, Callable[[Any], bytes], Callable[[bytes], Any]], ...] = (
    (dt.datetime, 4, lambda value: write_moment(value).encode(), lambda data: read_datetime(data.decode())),
    (dt.date, 5, lambda value: write_date(value).encode(), lambda data: read_date(data.decode())),
    (dt.time, 6, lambda value: write_moment(value).encode(), lambda data: read_time(data.decode())),
    (
        dt.timedelta,
        7,
        lambda value: _packb([value.days, value.seconds, value.microseconds]),
        lambda data: dt.timedelta(*_unpackb(data, max_array_len=3, max_map_len=0, max_str_len=0, max_bin_len=0)),
    ),
    (uuid.UUID, 8, lambda value: value.bytes, lambda data: uuid.UUID(bytes=data)),
    (Decimal, 9, lambda value: str(value).encode(), lambda data: Decimal(data.decode())),
    (
        int,  # Of more than 64 bits.
        10,
        lambda value: value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True),
        lambda data: int.from_bytes(data, "big", signed=True),
    ),
)
_WRITERS = {kind: (code, write) for kind, code, write, _ in _SCALARS}
_READERS = {code: read for _, code, _, read in _SCALARS}
_CONTAINERS: Mapping[type[Any], Any] = {tuple: Ext(1, b""), set: Ext(2, b""), frozenset: Ext(3, b"")}
CONTAINER_READERS: Mapping[int, ContainerReader] = {1: tuple, 2: set, 3: frozenset}

_PLAIN: frozenset[type[Any]] = frozenset({type(None), bool, int, float, str, bytes})
_UNPLAIN: frozenset[type[Any]] = frozenset({tuple, frozenset, memoryview})


class _Marker(NamedTuple):
    """First item of an array that represents a container other than a list."""

    code: int


class _Marked(Exception):
    """Raised when a marker is found, so that each array must be examined."""


class MsgpackSerializer:
    """Serializer for msgpack. It rejects values that could not be restored exactly.

    A subclass that supports more types overrides `write_other` and adds `_readers` for its containers.
    """

    name = "msgpack"

    def __init__(self) -> None:
        self._readers: Mapping[int, ContainerReader] = CONTAINER_READERS
        # Creating a packer takes a fifth of the time of packing 1 KB. Each packer is used by one thread at a time.
        self._packers: list[Any] = []

    def dumps(self, value: Any) -> bytes:
        """Serialize a value. Raises `CacheSerializationError`, which names an unsupported type."""
        try:
            packer = self._packer()
            packed: bytes = packer.pack(value)
        except CacheSerializationError:
            raise
        except (ValueError, TypeError, OverflowError) as error:
            if isinstance(error, UnicodeError):
                problem = "it contains a str that is not valid Unicode"
            elif "recursion" in str(error):
                problem = "it is nested too deeply, or contains itself"
            else:
                problem = f"it contains something that msgpack does not support ({type(error).__name__})"
            raise CacheSerializationError(
                f"the serializer {self.name!r} cannot serialize the value: {problem}"
            ) from None
        # A packer's buffer never shrinks. A packer that failed keeps partial output, so it is not reused.
        if len(packed) < _PACKED_MAX:
            self._packers.append(packer)
        # msgpack silently writes a bytearray or a memoryview as bytes. Look for them only if bytes were written.
        if type(value) not in _PLAIN and (b"\xc4" in packed or b"\xc5" in packed or b"\xc6" in packed):
            self._refuse_buffers(value)
        return packed

    def loads(self, data: bytes | memoryview, *, trusted: bool = False) -> Any:
        """Deserialize a value. Errors of msgpack and the types propagate.

        Forged data cannot use more memory than genuine values of the same size.
        """
        limit = len(data) if trusted else LARGE_ARRAY
        try:
            return _unpackb(data, ext_hook=self._scalar, strict_map_key=False, timestamp=3, max_array_len=limit)
        except _Marked:
            pass
        except ValueError as error:
            if "max_array_len" not in str(error):
                raise
            limit = len(data)
            _walk(data)
        markers = 0  # Number of markers that were found but not yet consumed by an array.

        def ext(code: int, data: bytes) -> Any:
            nonlocal markers
            try:
                return self._scalar(code, data)
            except _Marked:
                markers += 1
                return _Marker(code)

        def array(items: list[Any]) -> Any:
            nonlocal markers
            if items and type(items[0]) is _Marker:
                markers -= 1
                return self._readers[items[0].code](items[1:])
            return items

        value = _unpackb(data, ext_hook=ext, list_hook=array, strict_map_key=False, timestamp=3, max_array_len=limit)
        if markers:
            raise ValueError("a marker without a container")
        return value

    def write_other(self, value: Any) -> Any:
        """Return a substitute for a value of another type. Raises `CacheSerializationError`."""
        refuse(value, self.name)

    def _packer(self) -> Any:
        try:
            return self._packers.pop()
        except IndexError:
            return _Packer(default=self._default, strict_types=True)

    def _default(self, value: Any) -> Any:
        kind = type_of(value)
        if (marker := _CONTAINERS.get(kind)) is not None:
            return [marker, *value]
        if (scalar := _WRITERS.get(kind)) is not None:
            return Ext(scalar[0], scalar[1](value))
        return self.write_other(value)

    def _scalar(self, code: int, data: bytes) -> Any:
        read = _READERS.get(code)
        if read is not None:
            return read(data)
        if code in self._readers and not data:
            raise _Marked
        raise ValueError("an unknown extension type")

    def _refuse_buffers(self, value: Any) -> None:
        waiting = [value]
        while waiting:
            each = waiting.pop()
            kind = type_of(each)
            if kind is dict:
                waiting.extend(
                    chain(each.keys(), each.values()) if _UNPLAIN.intersection(map(type_of, each)) else each.values()
                )
            elif kind in (list, tuple, set, frozenset):
                if not _PLAIN.issuperset(map(type_of, each)):
                    waiting.extend(each)
            elif kind is bytearray or kind is memoryview:
                refuse(each, self.name)


def _walk(data: bytes | memoryview) -> None:
    """Scan a message without building values. Raises `ValueError` if it is truncated."""
    unpacker: Any = _Unpacker(max_buffer_size=len(data) + 1, strict_map_key=False)
    unpacker.feed(data)
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        raise ValueError("the message is truncated") from None
