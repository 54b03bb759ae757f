"""Scalars that neither msgpack nor JSON has, as text that any language reads.

Date, time and datetime are ISO 8601. A zone of the tz database follows in brackets, as RFC 9557 has it
(`2024-03-31T02:30:00+01:00[Europe/Berlin]`), and so does a fold where there is one (`[_fold=1]`).
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast
from zoneinfo import ZoneInfo

from cachebus.messages import CacheSerializationError

DT = TypeVar("DT", dt.datetime, dt.time)
type_of: Callable[[object], type[Any]] = type  # to a type checker, type() of Any is not fully known

_FOLD = "[_fold=1]"


def type_name(kind: type[Any]) -> str:
    """How a sentence calls a type: builtins by name, others with their module."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def refuse(value: object, serializer: str) -> NoReturn:
    """Raise the `CacheSerializationError` for a type that a serializer does not carry. Says who does."""
    kind = type_of(value)
    raise CacheSerializationError(
        f"the serializer {serializer!r} does not carry a {type_name(kind)}; {_who_carries(kind, serializer)} does"
    )


def _who_carries(kind: type[Any], serializer: str) -> str:
    family = kind.__module__.partition(".")[0]
    if serializer != "auto" and (
        (family == "numpy" and kind.__name__ == "ndarray")
        or (family == "pandas" and kind.__name__ == "Series")
        or _is_numpy_scalar(kind)
    ):
        return "'auto'"
    if serializer not in ("auto", "arrow") and family == "pandas" and kind.__name__ == "DataFrame":
        return "'auto', or on its own 'arrow',"
    if family == "pyarrow" and kind.__name__ == "Table":
        return "'arrow'"
    registrable = issubclass(kind, enum.Enum) or any(
        hasattr(kind, name) for name in ("__dataclass_fields__", "__pydantic_fields__", "_fields")
    )
    return "'auto', with the class among payload.types," if registrable else "'pickle'"


def _is_numpy_scalar(kind: type[Any]) -> bool:
    return any(base.__module__ == "numpy" and base.__name__ == "generic" for base in kind.__mro__)


def write_date(value: dt.date) -> str:
    return value.isoformat()


def read_date(text: str) -> dt.date:
    return dt.date.fromisoformat(text)


def write_moment(value: dt.datetime | dt.time) -> str:
    """A datetime or a time as text. Raises `CacheSerializationError` for a zone that would not come back as it is."""
    text = value.isoformat()
    zone = value.tzinfo
    if zone is not None and zone is not dt.UTC:
        kind = type(zone)
        if kind is ZoneInfo:
            name = cast("ZoneInfo", zone).key
            if not name:
                raise CacheSerializationError("a ZoneInfo without a key cannot be named, so it cannot be stored")
            text += f"[{name}]"
        elif kind is not dt.timezone:
            raise CacheSerializationError(
                f"a time zone of the type {type_name(kind)} would not come back as it is; use zoneinfo, or 'pickle'"
            )
        elif zone.tzname(None) != dt.timezone(cast("dt.timedelta", zone.utcoffset(None))).tzname(None):
            raise CacheSerializationError("the name of a fixed offset would be lost; use zoneinfo, or 'pickle'")
    return text + _FOLD if value.fold else text


def read_datetime(text: str) -> dt.datetime:
    return _read_moment(dt.datetime, text)


def read_time(text: str) -> dt.time:
    return _read_moment(dt.time, text)


def _read_moment(kind: type[DT], text: str) -> DT:
    fold = text.endswith(_FOLD)
    if fold:
        text = text.removesuffix(_FOLD)
    zone = None
    if text.endswith("]"):
        text, _, name = text[:-1].partition("[")
        zone = ZoneInfo(name)
    value: Any = kind.fromisoformat(text)
    if zone is not None:
        value = value.replace(tzinfo=zone)
    return cast("DT", value.replace(fold=1) if fold else value)


def write_int(value: int) -> bytes:
    """An int of any size: big-endian two's complement."""
    return value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)


def read_int(data: bytes) -> int:
    return int.from_bytes(data, "big", signed=True)
