"""Values survive the pipeline with their types, or are refused with an error that names the type."""

from __future__ import annotations

import collections
import datetime as dt
import enum
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings

from cachebus.messages import CacheCapacityError, CacheSerializationError

from .pipelines import (
    COMPRESSIONS,
    EXAMPLE,
    PROTECTIONS,
    SERIALIZERS,
    VALUES,
    Color,
    Point,
    combinations,
    pipeline,
    same,
)

ALL = {names: pipeline(names[0], names[2], compression=names[1], threshold=0) for names in combinations()}


@pytest.mark.parametrize(("serializer", "compression", "protection"), [*ALL])
def test_the_example_comes_back(serializer: str, compression: str, protection: str) -> None:
    made = ALL[serializer, compression, protection]
    assert same(made.decode("k", made.encode("k", EXAMPLE)), EXAMPLE)


@given(VALUES)
@settings(max_examples=300)
def test_any_value_comes_back_through_every_serializer(value: Any) -> None:
    for serializer in SERIALIZERS:
        made = ALL[serializer, "none", "none"]
        assert same(made.decode("k", made.encode("k", value)), value)


@given(VALUES)
@settings(max_examples=30)
def test_any_value_comes_back_through_every_compression_and_protection(value: Any) -> None:
    for compression in COMPRESSIONS:
        for protection in PROTECTIONS:
            made = ALL["msgpack", compression, protection]
            assert same(made.decode("k", made.encode("k", value)), value)


class Number(enum.IntEnum):
    ONE = 1


class Pair(NamedTuple):
    a: int


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize("serializer", ["msgpack", "json"])
@pytest.mark.parametrize(
    ("value", "named", "remedy"),
    [
        (object(), "object", "pickle"),
        (1j, "complex", "pickle"),
        (bytearray(b"x"), "bytearray", "pickle"),
        (memoryview(b"x"), "memoryview", "pickle"),
        (collections.OrderedDict(a=1), "collections.OrderedDict", "pickle"),
        (Text("x"), "Text", "pickle"),
        (Number.ONE, "Number", "auto"),
        (Color.RED, "Color", "auto"),
        (Pair(1), "Pair", "auto"),
        (Point(1, 2), "Point", "auto"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_type_that_would_not_come_back_is_refused_by_name(
    serializer: str, value: Any, named: str, remedy: str
) -> None:
    for held in (value, [{"a": (value,)}], {1: value}):
        with pytest.raises(CacheSerializationError) as refused:
            pipeline(serializer).encode("k", held)
        assert f"{named};" in str(refused.value)
        assert f"'{remedy}'" in str(refused.value)


@pytest.mark.parametrize("serializer", ["msgpack", "json", "pickle"])
def test_what_has_no_end_is_refused(serializer: str) -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    made = pipeline(serializer)
    if serializer == "pickle":
        assert made.decode("k", made.encode("k", endless))[0] is not endless
    else:
        with pytest.raises(CacheSerializationError):
            made.encode("k", endless)
    with pytest.raises(CacheSerializationError):
        made.encode("k", deep)


@pytest.mark.parametrize("serializer", ["msgpack", "json"])
def test_text_that_is_no_unicode_is_refused_without_showing_it(serializer: str) -> None:
    with pytest.raises(CacheSerializationError, match="not valid Unicode") as refused:
        pipeline(serializer).encode("k", {"a": "secret \ud800"})
    assert "secret" not in repr(refused.value)


@pytest.mark.parametrize("serializer", ["msgpack", "json"])
def test_a_zone_that_would_be_lost_is_refused(serializer: str) -> None:
    class Own(dt.tzinfo):
        def utcoffset(self, _: dt.datetime | None) -> dt.timedelta:
            return dt.timedelta(0)

        dst = utcoffset

        def tzname(self, _: dt.datetime | None) -> str:
            return "own"

    for zone in (Own(), dt.timezone(dt.timedelta(hours=1), "CET")):
        with pytest.raises(CacheSerializationError, match="zoneinfo"):
            pipeline(serializer).encode("k", dt.datetime(2024, 1, 1, tzinfo=zone))


def test_what_pickle_itself_cannot_write_is_refused() -> None:
    class Rude:
        def __reduce__(self) -> Any:
            raise OSError("secret")

    with pytest.raises(CacheSerializationError, match="Rude: OSError") as refused:
        pipeline("pickle").encode("k", Rude())
    assert "secret" not in str(refused.value)


def test_a_value_larger_than_the_bound_is_refused_with_both_sizes() -> None:
    made = pipeline(max_size=1000)
    assert made.decode("k", made.encode("k", b"x" * 997)) == b"x" * 997
    with pytest.raises(CacheCapacityError, match=r"1,001 bytes.*1,000 bytes"):
        made.encode("k", b"x" * 998)
