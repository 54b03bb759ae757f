"""Portable text forms of scalars that msgpack and JSON lack.

Dates, times and datetimes use ISO 8601. A zone of the tz database follows in brackets, as in RFC 9557
(`2024-03-31T02:30:00+01:00[Europe/Berlin]`), and so does a fold (`[_fold=1]`).
"""

from __future__ import annotations

import datetime as dt
import enum
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn, TypeVar, cast
from zoneinfo import ZoneInfo

from cachebus.messages import CacheSerializationError

DT = TypeVar("DT", dt.datetime, dt.time)
type_of: Callable[[object], type[Any]] = type  # For type checkers, type() of Any is partially unknown.

_FOLD = "[_fold=1]"


def type_name(kind: type[Any]) -> str:
    """Return the name of a type for messages: builtins by name, other types with their module."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def refuse(value: object, serializer: str) -> NoReturn:
    """Raise `CacheSerializationError` for an unsupported type. The message names a serializer that supports it."""
    kind = type_of(value)
    family, name = kind.__module__.partition(".")[0], kind.__name__
    in_auto = (family, name) in (("numpy", "ndarray"), ("pandas", "Series")) or any(
        base.__module__ == "numpy" and base.__name__ == "generic" for base in kind.__mro__
    )
    if serializer != "auto" and in_auto:
        carrier = "'auto'"
    elif serializer not in ("auto", "arrow") and (family, name) == ("pandas", "DataFrame"):
        carrier = "'auto' (or 'arrow' for a single DataFrame)"
    elif (family, name) == ("pyarrow", "Table"):
        carrier = "'arrow'"
    elif issubclass(kind, enum.Enum) or any(
        hasattr(kind, each) for each in ("__dataclass_fields__", "__pydantic_fields__", "_fields")
    ):
        carrier = "'auto' with the class in payload.types"
    else:
        carrier = "'pickle'"
    raise CacheSerializationError(f"the serializer {serializer!r} does not support {type_name(kind)}; {carrier} does")


write_date = dt.date.isoformat
read_date = dt.date.fromisoformat


def write_moment(value: dt.datetime | dt.time) -> str:
    """Return a datetime or a time as text. Raises `CacheSerializationError` if its zone cannot be restored exactly."""
    text = value.isoformat()
    zone = value.tzinfo
    if zone is not None and zone is not dt.UTC:
        kind = type(zone)
        if kind is ZoneInfo:
            name = cast("ZoneInfo", zone).key
            if not name:
                raise CacheSerializationError("cannot serialize a ZoneInfo without a key")
            text += f"[{name}]"
        elif kind is not dt.timezone:
            raise CacheSerializationError(
                f"a time zone of type {type_name(kind)} cannot be restored exactly; use zoneinfo, or 'pickle'"
            )
        elif zone.tzname(None) != dt.timezone(cast("dt.timedelta", zone.utcoffset(None))).tzname(None):
            raise CacheSerializationError("a fixed offset would lose its name; use zoneinfo, or 'pickle'")
    return text + _FOLD if value.fold else text


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


read_datetime: Callable[[str], dt.datetime] = partial(_read_moment, dt.datetime)
read_time: Callable[[str], dt.time] = partial(_read_moment, dt.time)
