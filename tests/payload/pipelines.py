"""Pipelines and values for the tests of payloads."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import math
import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

from cachebus.payload.pipeline import PayloadPipeline
from cachebus.payload.sealing import Sealer, Signer

SIGNING_KEY = bytes(range(32))
MASTER_KEY = bytes(range(100, 132))

SERIALIZERS = ("msgpack", "json", "auto", "pickle")
COMPRESSIONS = ("none", "zlib", "gzip", "lz4", "zstd")
PROTECTIONS = ("none", "checksum", "signed", "sealed", "signed and sealed")


def pipeline(serializer: Any = "msgpack", protection: str = "none", **options: Any) -> PayloadPipeline:
    """Return a pipeline with the keys of the tests. Pickle is always signed."""
    if "signed" in protection or serializer == "pickle":
        options.setdefault("signer", Signer([SIGNING_KEY]))
    if "sealed" in protection:
        options.setdefault("sealer", Sealer({"k1": MASTER_KEY}, tenant="shop"))
    return PayloadPipeline(serializer, checksum=protection == "checksum", **options)


def same(left: Any, right: Any) -> bool:
    """Return `True` if two values are equal and of the same types at every level. All NaNs are equal."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return len(left) == len(right) and all(
            same(a, b) and same(left[a], right[b]) for a, b in zip(left, right, strict=True)
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, set | frozenset):
        return _counted(left) == _counted(right)
    if isinstance(left, float):
        return repr(left) == repr(right)
    if isinstance(left, Decimal):
        return repr(left) == repr(right)
    if isinstance(left, dt.datetime | dt.time):
        return repr(left) == repr(right)  # The repr includes the zone and the fold.
    return bool(left == right)


def _counted(items: Any) -> list[tuple[str, str]]:
    # Compared by repr, because NaN is not equal to itself, and 1 is equal to 1.0 and True.
    return sorted((type(each).__name__, repr(_ordered(each))) for each in items)


def _ordered(value: Any) -> Any:
    return (
        _counted(value)
        if isinstance(value, frozenset)
        else [_ordered(each) for each in value]
        if isinstance(value, tuple)
        else value
    )


# Without the first and last day, where a zone offset leads out of the range of datetime.
FIRST, LAST = dt.datetime(2, 1, 1), dt.datetime(9998, 12, 31)  # noqa: DTZ001
ZONES: st.SearchStrategy[Any] = st.sampled_from(
    [None, dt.UTC, dt.timezone(dt.timedelta(hours=-3, minutes=-30)), ZoneInfo("Europe/Berlin"), ZoneInfo("UTC")]
)
_HASHABLE_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text()
    | st.binary()
    | st.datetimes(FIRST, LAST, timezones=ZONES, allow_imaginary=True)
    | st.dates()
    | st.times(timezones=ZONES)
    | st.timedeltas()
    | st.uuids()
    | st.decimals(allow_nan=False)
)
HASHABLE = st.recursive(
    _HASHABLE_LEAVES,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
VALUES = st.recursive(
    _HASHABLE_LEAVES | st.decimals(allow_nan=True),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.sampled_from(["$", "$$", "$tuple", "$map"]), inner)
        | st.dictionaries(HASHABLE, inner)
        | st.sets(HASHABLE)
        | st.frozensets(HASHABLE)
    ),
    max_leaves=12,
)
"""Nested value with every type that all serializers support."""

EXAMPLE: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "ints": [0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 2**100, -(2**100)],
    "floats": [0.5, -0.0, 1e300, math.inf, -math.inf],
    "text": "naïve ☕",
    "bytes": b"\x00\xff",
    "tuple": (1, (2, [3])),
    "sets": [{1}, frozenset({2})],
    "keys": {1: "int", None: "none", (1, 2): "tuple", b"x": "bytes"},
    "naive": dt.datetime(2024, 2, 29, 12, 30, 1, 5),  # noqa: DTZ001
    "utc": dt.datetime(2024, 2, 29, 12, 30, tzinfo=dt.UTC),
    "offset": dt.datetime(2024, 2, 29, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30))),
    "zone": dt.datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
    "date": dt.date(2024, 2, 29),
    "time": dt.time(12, 30, 1, 5),
    "timedelta": dt.timedelta(days=-1, seconds=3, microseconds=7),
    "uuid": uuid.UUID("12345678-1234-5678-1234-567812345678"),
    "decimal": [Decimal("1.20"), Decimal("-Infinity")],
    "like a tag": [{"$tuple": [1]}, {"$": 1}, {"$$x": {"$y": 1}}],
}
"""Values in the golden files."""


def combinations() -> Iterator[tuple[str, str, str]]:
    """Return the combinations of all serializers, compressions and protections."""
    for serializer in SERIALIZERS:
        for compression in COMPRESSIONS:
            for protection in PROTECTIONS:
                yield serializer, compression, protection


@dataclasses.dataclass
class Point:
    x: int
    y: Any


class Color(enum.Enum):
    RED = 1
    BLUE = "blue"
