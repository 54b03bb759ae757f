"""`auto` and `arrow`: NumPy, pandas and registered classes."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from pandas.testing import assert_frame_equal, assert_series_equal
from pydantic import BaseModel, PrivateAttr, field_validator

from cachebus.messages import CacheConfigurationError, CacheSerializationError
from cachebus.payload.pipeline import PayloadPipeline

from .pipelines import VALUES, Color, Point, pipeline, same


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: int
    inner: Point
    derived: int = dataclasses.field(init=False, default=7)

    def __post_init__(self) -> None:
        raise AssertionError("a payload must not run this")


class Access(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


class Pair(NamedTuple):
    a: int
    b: Any


class User(BaseModel):
    name: str
    point: Point | None = None
    seen: dt.datetime | None = None
    _token: int = PrivateAttr(3)

    @field_validator("name")
    @classmethod
    def _doubled(cls, name: str) -> str:
        return name * 2


TYPES = (Point, Color, Frozen, Access, Pair, User)


def auto() -> PayloadPipeline:
    return pipeline("auto", types=TYPES)


def there_and_back(value: Any, made: PayloadPipeline | None = None) -> Any:
    made = made or auto()
    return made.decode("k", made.encode("k", value))


def frozen() -> Frozen:
    made = object.__new__(Frozen)
    for name, value in (("x", 1), ("inner", Point(1, {2})), ("derived", 9)):
        object.__setattr__(made, name, value)
    return made


@pytest.mark.parametrize(
    "value",
    [
        Point(1, (2, [Color.BLUE])),
        frozen(),
        Access.READ | Access.WRITE,
        Pair(1, Pair(2, None)),
        User(name="a", point=Point(1, 2)),
        {Color.RED: [Point(1, 2)]},
        np.float64(1.5),
        np.int8(-3),
        np.datetime64("2020-01-01", "ns"),
        np.str_("text"),
        np.bool_(True),
        np.complex64(1j),
        {np.int64(3): (np.float32(1),)},
    ],
    ids=repr,
)
def test_registered_classes_and_scalars_come_back(value: Any) -> None:
    back = there_and_back([value])[0]
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_a_model_comes_back_with_what_was_set_and_what_is_private() -> None:
    user = User(name="a")
    user._token = 8
    back = there_and_back(user)
    assert (back, back.model_fields_set, back._token) == (user, {"name"}, 8)


@given(st.builds(Point, st.integers(), VALUES))
def test_any_value_comes_back_within_a_registered_class(value: Point) -> None:
    back = there_and_back(value)
    assert type(back) is Point
    assert same([back.x, back.y], [value.x, value.y])


@given(
    npst.arrays(
        npst.scalar_dtypes() | npst.byte_string_dtypes() | npst.unicode_string_dtypes(), npst.array_shapes(min_side=0)
    )
)
def test_any_array_comes_back(array: Any) -> None:
    for value in (array, np.asfortranarray(array), array[::-1]):
        back = there_and_back(value)
        assert (back.dtype, back.shape, back.tobytes()) == (value.dtype, value.shape, value.tobytes())
    assert there_and_back(np.asfortranarray(array)).flags.f_contiguous


@pytest.mark.parametrize(
    "value",
    [np.array([object()]), np.array([(1, 2)], dtype=[("a", "i4"), ("b", "i4")]), np.ma.array([1]), pd.Index([1])],
    ids=["objects", "structured", "masked", "index"],
)
def test_what_auto_does_not_carry_is_refused_by_name(value: Any) -> None:
    with pytest.raises(CacheSerializationError, match=r"'auto' does not support .*'pickle' does"):
        auto().encode("k", value)


class TestClasses:
    def test_one_that_is_not_registered_is_refused_on_both_sides(self) -> None:
        bare = pipeline("auto")
        with pytest.raises(CacheSerializationError, match=r"Point; 'auto' with the class in payload\.types does"):
            bare.encode("k", Point(1, 2))
        with pytest.raises(CacheSerializationError) as refused:
            bare.decode("k", auto().encode("k", Point(1, 2)))
        assert refused.value.reason == "content"

    def test_one_whose_fields_have_changed_is_not_put_together(self) -> None:
        @dataclasses.dataclass
        class Changed:
            x: str
            y: Any

        Changed.__module__, Changed.__qualname__ = Point.__module__, Point.__qualname__
        with pytest.raises(CacheSerializationError):
            pipeline("auto", types=[Changed]).decode("k", auto().encode("k", Point(1, 2)))

    def test_attributes_that_would_be_lost_are_refused(self) -> None:
        point = Point(1, 2)
        point.more = 3  # type: ignore[attr-defined]
        with pytest.raises(CacheSerializationError, match="attributes that are not fields"):
            auto().encode("k", point)

    def test_a_class_of_another_kind_cannot_be_registered(self) -> None:
        with pytest.raises(CacheConfigurationError, match="expected a dataclass"):
            pipeline("auto", types=[TestClasses])


FRAME = pd.DataFrame(
    {
        "int": range(4),
        "float": [1.5, float("nan"), -0.0, 2],
        "text": ["a", "ü", "", "d"],
        "when": pd.date_range("2024", periods=4, tz="Europe/Berlin"),
        "category": pd.Categorical(["a", "a", "b", "b"]),
        "nullable": pd.array([1, None, 3, 4], dtype="Int64"),
        "decimal": [Decimal("1.20")] * 4,
        "date": [dt.date(2024, 1, 1)] * 4,
    }
)


@pytest.mark.parametrize("serializer", ["auto", "arrow"])
@pytest.mark.parametrize("protection", ["none", "sealed"])
@pytest.mark.parametrize(
    "frame",
    [
        FRAME,
        FRAME.set_index("text"),
        FRAME.set_index(["int", "text"]),
        FRAME.iloc[::2],
        pd.DataFrame(np.ones((2, 2))),
        pd.DataFrame(),
        pd.DataFrame({"a": [None, None]}),
        pd.DataFrame({"a": [1]}, index=pd.Index([3], name="x")),
    ],
    ids=["plain", "text index", "two indices", "slice", "unnamed columns", "empty", "nulls", "named index"],
)
def test_a_frame_comes_back(serializer: str, protection: str, frame: Any) -> None:
    made = pipeline(serializer, protection, compression="zstd")
    assert_frame_equal(there_and_back(frame, made), frame)


@pytest.mark.parametrize("name", ["int", "when", "category", "date"])
def test_a_series_comes_back(name: str) -> None:
    assert_series_equal(there_and_back([FRAME[name]])[0], FRAME[name])
    unnamed = FRAME[name].rename(None)
    assert_series_equal(there_and_back(unnamed), unnamed)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": [1, "x", None]}, dtype=object),
        pd.DataFrame({"a": [1, 2]}, dtype=object),
        pd.DataFrame({"a": [object()]}),
        pd.DataFrame({"a": [{"x": 1}, {"y": 2}]}),
        pd.DataFrame({"a": [(1, 2)]}),
        pd.DataFrame({1: [1], "b": [2]}),
    ],
    ids=["mixed", "ints as objects", "object", "dicts", "tuples", "mixed names"],
)
def test_a_frame_that_arrow_would_change_is_refused(frame: Any) -> None:
    with pytest.raises(CacheSerializationError, match="'pickle' supports it"):
        pipeline("arrow").encode("k", frame)


def test_a_table_comes_back() -> None:
    table = pa.table({"a": [1, None], "b": [["x"], []]})
    assert there_and_back(table, pipeline("arrow")).equals(table)


@pytest.mark.parametrize("value", [{"a": 1}, FRAME["int"], np.ones(3)])
def test_arrow_carries_frames_and_nothing_else(value: Any) -> None:
    with pytest.raises(CacheSerializationError, match="'arrow' does not support"):
        pipeline("arrow").encode("k", value)


RUNS: Any = pa.RunEndEncodedArray


def _arrow(table: Any, compression: Any = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return b"\x01d-\x00t" + data


@pytest.mark.parametrize(
    "payload",
    [
        _arrow(pa.table({"a": pa.array([0] * 100_000)}), "lz4"),
        _arrow(pa.table({"a": pa.array(["x"] * 100_000).dictionary_encode()}), "zstd"),
        _arrow(pa.table({"a": pa.nulls(2**27)})),
        _arrow(pa.table({"a": pa.array(["x"], pa.string_view())})),
        _arrow(pa.table({"a": RUNS.from_arrays([2**30], [1])})),
    ],
    ids=["compressed", "compressed dictionary", "nulls", "views", "runs"],
)
def test_an_arrow_stream_that_claims_more_than_it_holds_is_rejected(payload: bytes) -> None:
    with pytest.raises(CacheSerializationError) as refused:
        pipeline("arrow").decode("k", payload)
    assert refused.value.reason == "content"
