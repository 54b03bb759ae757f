"""The serializer `json`: portable JSON, with tags for types that JSON lacks.

A tag is an object whose only key begins with `$`: `{"$tuple": [1, 2]}`, `{"$datetime": "2024-05-01T10:00:00"}`. If a
user's dict has a single key that begins with `$`, another `$` is added to the key and removed again on reading.

| tag | content |
| --- | --- |
| `$tuple` `$set` `$frozenset` | array of the items |
| `$map` | array of pairs: a dict with a key that is not a string |
| `$datetime` `$date` `$time` | ISO 8601 text, with the zone in brackets as in RFC 9557 |
| `$timedelta` | array: days, seconds, microseconds |
| `$uuid` `$decimal` | text |
| `$bytes` | base64 |
| `$int` | hexadecimal text: more than 64 bits |
| `$float` | `nan`, `inf`, `-inf` |
"""

from __future__ import annotations

import binascii
import datetime as dt
import math
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

import msgpack  # type: ignore[import-untyped]

from cachebus.messages import CacheSerializationError

from ..format import load
from .scalars import (
    read_date,
    read_datetime,
    read_time,
    refuse,
    type_of,
    write_date,
    write_moment,
)

DEPTH_MAX = 200
"""Maximum nesting depth of values that need tags. Without tags, the limit of orjson applies (254)."""

_Packer: Any = msgpack.Packer  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
_KEPT_BUFFER = 65_536
"""Maximum size, in bytes, of a value after which its packer is reused."""
_NOT_FINITE = re.compile(rb"\xcb[\x7f\xff][\xf0-\xff]").search
"""Search for NaN and infinity in MessagePack. It can report false positives."""
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1

_SCALARS: Mapping[type[Any], tuple[str, Callable[[Any], Any]]] = {
    bytes: ("$bytes", lambda value: binascii.b2a_base64(value, newline=False).decode("ascii")),
    dt.datetime: ("$datetime", write_moment),
    dt.date: ("$date", write_date),
    dt.time: ("$time", write_moment),
    dt.timedelta: ("$timedelta", lambda value: [value.days, value.seconds, value.microseconds]),
    uuid.UUID: ("$uuid", str),
    Decimal: ("$decimal", str),
}
_CONTAINERS: Mapping[type[Any], str] = {tuple: "$tuple", set: "$set", frozenset: "$frozenset"}
_SCALAR_READERS: Mapping[str, Callable[[Any], Any]] = {
    "$bytes": lambda text: binascii.a2b_base64(text, strict_mode=True),
    "$datetime": read_datetime,
    "$date": read_date,
    "$time": read_time,
    "$timedelta": lambda parts: dt.timedelta(*map(int, parts)),
    "$uuid": uuid.UUID,
    "$decimal": Decimal,
    "$int": lambda text: int(text, 16),
    "$float": lambda text: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[text],
}
_CONTAINER_READERS: Mapping[str, Callable[[Iterable[Any]], Any]] = {
    **{tag: kind for kind, tag in _CONTAINERS.items()},
    "$map": dict,
}


class JsonSerializer:
    """Serializer for JSON. It rejects values that could not be restored exactly."""

    name = "json"

    def __init__(self) -> None:
        # A packer is taken out while it is in use; another thread, or a finalizer in between, creates a new one.
        self._packers: list[Any] = []
        orjson = load("orjson", "the serializer 'json'")
        self._dumps: Callable[[Any], bytes] = orjson.dumps
        self._loads: Callable[[Any], Any] = orjson.loads

    def dumps(self, value: Any) -> bytes:
        """Serialize a value. Raises `CacheSerializationError`, which names an unsupported type."""
        try:
            if (data := self._plain(value)) is not None:
                return data
            return self._dumps(_to_tree(value, DEPTH_MAX))
        except CacheSerializationError:
            raise
        except (TypeError, ValueError, RecursionError):
            # orjson's error is not chained, because it may show parts of the value.
            reason = "it contains a str that is not valid Unicode, or an int with too many digits"
        raise CacheSerializationError(f"the serializer 'json' cannot serialize the value: {reason}")

    def _plain(self, value: Any) -> bytes | None:
        """Return the JSON of a value if a quick check shows that it needs no tags."""
        try:
            # This type check runs in C. The packer rejects all types but the plain ones, bytes and its extension types;
            # orjson rejects the latter two.
            packer = self._packer()
            types: bytes = packer.pack(value)
            data = self._dumps(value)
        except (TypeError, ValueError, OverflowError):
            return None
        if len(types) <= _KEPT_BUFFER:  # A packer's buffer never shrinks. A packer that failed is not reused either.
            self._packers.append(packer)
        # Keys that look like tags, and NaN (which orjson writes as null), need the slow path. A search for one or two
        # bytes usually rules them out.
        if (b"$" in data and b'{"$' in data) or b"\xcb\x7f" in types or b"\xcb\xff" in types:
            return None if b'{"$' in data or _NOT_FINITE(types) else data
        return data

    def _packer(self) -> Any:
        try:
            return self._packers.pop()
        except IndexError:
            return _Packer(strict_types=True, buf_size=16_384)

    def loads(self, data: bytes | memoryview, *, trusted: bool = False) -> Any:
        """Deserialize a value. Errors of orjson and the types propagate."""
        if type(data) is not bytes:
            data = bytes(data)  # orjson would copy a view as well, and bytes can be searched.
        tree = self._loads(data)
        return _from_tree(tree) if b"$" in data and b'"$' in data else tree


def _to_tree(value: Any, depth: int) -> Any:
    kind = type_of(value)
    if value is None or kind is str or kind is bool:
        return value
    if kind is int:
        return value if _INT_MIN <= value <= _INT_MAX else {"$int": format(value, "x")}
    if kind is float:
        return value if math.isfinite(value) else {"$float": str(value)}
    if (scalar := _SCALARS.get(kind)) is not None:
        return {scalar[0]: scalar[1](value)}
    if depth <= 0:
        raise CacheSerializationError(
            f"the serializer 'json' supports at most {DEPTH_MAX} levels of nesting, and the value has more"
        )
    if kind is list:
        return [_to_tree(each, depth - 1) for each in value]
    if (tag := _CONTAINERS.get(kind)) is not None:
        return {tag: [_to_tree(each, depth - 1) for each in value]}
    if kind is not dict:
        refuse(value, "json")
    if not all(type(key) is str for key in value):
        return {"$map": [[_to_tree(key, depth - 1), _to_tree(each, depth - 1)] for key, each in value.items()]}
    tree = {key: _to_tree(each, depth - 1) for key, each in value.items()}
    if len(tree) == 1:
        ((key, each),) = tree.items()
        if key.startswith("$"):
            return {f"${key}": each}
    return tree


def _from_tree(tree: Any) -> Any:
    kind = type_of(tree)
    if kind is list:
        return [_from_tree(each) for each in tree]
    if kind is not dict:
        return tree
    if len(tree) == 1:
        ((key, each),) = tree.items()
        if key.startswith("$$"):
            return {key[1:]: _from_tree(each)}
        if key.startswith("$"):
            if (scalar := _SCALAR_READERS.get(key)) is not None:
                return scalar(each)
            if type_of(each) is not list:
                raise ValueError("a tag without its items")
            return _CONTAINER_READERS[key](map(_from_tree, each))
    return {key: _from_tree(each) for key, each in tree.items()}
