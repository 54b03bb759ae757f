"""What values are said to weigh."""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachebus.adapters.memory.store import estimate_size

MEGABYTE = 1 << 20


class Plain:
    def __init__(self, inside: Any) -> None:
        self.inside = inside


class Slotted:
    __slots__ = ("inside", "unset")

    def __init__(self, inside: Any) -> None:
        self.inside = inside


class OneSlot:
    __slots__ = "inside"  # noqa: PLC0205 (a bare str is allowed, and means one slot)

    def __init__(self, inside: Any) -> None:
        self.inside = inside


class Below(Slotted):
    __slots__ = ("more",)


@dataclass(slots=True)
class Record:
    inside: Any


class DictWithMore(dict[str, Any]):
    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside = inside


class ListWithMore(list[Any]):
    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside = inside


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inside: inside,
        lambda inside: [inside],
        lambda inside: (inside,),
        lambda inside: {inside},
        lambda inside: frozenset((inside,)),
        lambda inside: {"key": inside},
        lambda inside: {inside: "value"},
        lambda inside: deque([inside]),
        lambda inside: OrderedDict(key=inside),
        lambda inside: defaultdict(list, key=[inside]),
        Plain,
        Slotted,
        OneSlot,
        Below,
        Record,
        DictWithMore,
        ListWithMore,
        lambda inside: [[[Plain({"deep": (inside,)})]]],
    ],
)
def test_a_megabyte_is_found_wherever_it_is(wrap: Any) -> None:
    assert MEGABYTE < estimate_size(wrap(bytes(MEGABYTE))) < MEGABYTE + 3_000


@pytest.mark.parametrize(
    "value",
    [
        bytearray(MEGABYTE),
        memoryview(bytes(MEGABYTE)),
        array("b", bytes(MEGABYTE)),
        "x" * MEGABYTE,
        np.zeros(MEGABYTE, dtype=np.uint8),
        np.zeros(MEGABYTE, dtype=np.uint8)[:],
        [np.zeros(MEGABYTE // 8), "and a little more"],
    ],
    ids=["bytearray", "memoryview", "array", "str", "an array with its data", "a view of an array", "in a list"],
)
def test_buffers_are_counted_once(value: Any) -> None:
    assert MEGABYTE <= estimate_size(value) < 1.1 * MEGABYTE


def test_what_is_reached_by_two_ways_is_counted_once() -> None:
    big = bytes(MEGABYTE)
    assert estimate_size([big, big, {"again": big}]) < MEGABYTE + 2_000


def test_a_value_that_holds_itself_is_weighed() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    assert estimate_size(ring) >= sys.getsizeof(ring)


def test_a_deeply_nested_value_is_weighed_without_recursion() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    assert estimate_size(value) > 100_000


def test_a_class_weighs_as_itself_and_not_as_the_program() -> None:
    assert estimate_size(Plain) < 5_000
    assert estimate_size([Plain, int, dict]) < 10_000


@pytest.mark.parametrize("items", [20_000, 200_000])
@pytest.mark.parametrize("container", [list, tuple, dict.fromkeys])
def test_a_value_of_very_many_objects_is_extrapolated(items: int, container: Any) -> None:
    value = container([f"item number {number:08}" for number in range(items)])
    true = sys.getsizeof(value) + sum(map(sys.getsizeof, value))
    assert 0.5 * true < estimate_size(value) < 2 * true


def test_no_more_objects_are_looked_at_than_the_bound() -> None:
    looked = 0

    class Incremented:
        def __sizeof__(self) -> int:
            nonlocal looked
            looked += 1
            return 50

    estimate_size([Incremented() for _ in range(50_000)])
    assert looked <= 10_000


def test_an_object_without_a_size_is_taken_for_64_bytes() -> None:
    class Odd:
        __slots__ = ()

        def __sizeof__(self) -> int:
            raise TypeError

    assert estimate_size(Odd()) == 64


@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
        max_leaves=30,
    )
)
def test_any_plain_value_weighs_at_least_its_own_object(value: Any) -> None:
    assert estimate_size(value) >= sys.getsizeof(value)


@given(st.lists(st.binary(min_size=1, max_size=200), min_size=1))
def test_a_value_never_grows_lighter_by_holding_more(items: list[bytes]) -> None:
    assert estimate_size(items) >= estimate_size(items[:-1])
