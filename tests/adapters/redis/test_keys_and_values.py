from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachebus import escape_pattern
from cachebus.adapters.common.glob import compile_glob, widen
from cachebus.adapters.redis.entry import decode, encode
from cachebus.messages import (
    CacheCapacityError,
    CacheKeyError,
    CacheSerializationError,
    Deleted,
    DeletePattern,
    Get,
    GetMany,
    Scan,
    Set,
    Stored,
)

from .conftest import one

KEYS = [
    " ",
    "a b",
    "a\r\nSET b 1\r\n",
    "\0",
    "a\0b",
    "k" * 10_000,
    "*",
    "?",
    "[a-z]",
    "\\",
    "a^b-c]",
    "other:key",
    "tests:key",
    "tests:tests:key",
    "\N{SNAKE}",
    "é",
    "é",
    "\x7f",
    ":",
]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: ascii(key)[:20])
async def test_a_key_is_data_and_nothing_else(store: Any, key: str) -> None:
    await one(store, Set("bystander", b"here"))
    assert isinstance(await one(store, Set(key, key)), Stored)
    assert (await one(store, Get(key))).value == key
    assert list((await one(store, GetMany((key, "nobody")))).entries) == [key]
    assert key in (await one(store, Scan())).keys
    assert await one(store, DeletePattern(escape_pattern(key))) == Deleted(1)
    assert (await one(store, Get("bystander"))).value == b"here"


async def test_a_lone_surrogate_is_refused_and_its_neighbours_are_not(store: Any) -> None:
    replies = await store.execute([Set("a", 1), Set("\ud800", 1), Get("a"), Get("\udfff"), GetMany(("a", "\ud800"))])
    assert isinstance(replies[0], Stored)
    assert replies[2].value == 1
    for refused in (replies[1], replies[3], replies[4]):
        assert isinstance(refused.error(), CacheKeyError)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(-(2**63), 2**63 - 1), inner),
    max_leaves=10,
)


@given(VALUES)
def test_a_value_comes_back_as_it_went(value: Any) -> None:
    found = decode(struct.pack(">dd", 1.0, 0.0) + encode(value))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        pytest.param(object(), "object", id="object"),
        ((1, 2), "tuple"),
        ([(1,)], "tuple"),
        ({1, 2}, "set"),
        (bytearray(b"x"), "bytearray"),
        (2**64, "int"),
        (1j, "complex"),
        ("\ud800", "str"),
    ],
    ids=lambda each: repr(each).partition(" at 0x")[0],  # The same in every run and in every test worker.
)
async def test_a_value_that_would_not_come_back_is_refused_by_its_type(store: Any, value: Any, named: str) -> None:
    await one(store, Set("a", b"old"))
    error = (await one(store, Set("a", value))).error()
    assert isinstance(error, CacheSerializationError)
    assert named in str(error)
    assert (await one(store, Get("a"))).value == b"old"


def test_endless_nesting_is_refused() -> None:
    nested: list[Any] = []
    nested.append(nested)
    with pytest.raises(CacheSerializationError):
        encode(nested)


@given(st.binary(max_size=40))
def test_any_bytes_are_a_value_or_a_clear_error(raw: bytes) -> None:
    with contextlib.suppress(CacheSerializationError):
        decode(raw)


async def test_an_empty_value_and_one_of_64_mib_come_back(store: Any) -> None:
    large = bytes(range(256)) * (64 * 2**20 // 256)
    await store.execute([Set("empty", b""), Set("text", ""), Set("large", large)])
    empty, text, found = await store.execute([Get("empty"), Get("text"), Get("large")])
    assert (empty.value, text.value) == (b"", "")
    assert found.value == large
    assert (await one(store, Get("empty"))).value == b""


def test_a_value_over_the_limit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachebus.adapters.redis.entry.VALUE_MAX", 100)
    assert encode(b"x" * 99)
    with pytest.raises(CacheCapacityError, match="100 bytes"):
        encode(b"x" * 101)


async def test_two_readers_of_one_batch_do_not_share_a_list(store: Any) -> None:
    await one(store, Set("a", [1]))
    first, second = await store.execute([Get("a"), Get("a")])
    first.value.append(2)
    assert second.value == [1]


@given(st.text("ab*?[]^-\\", max_size=12), st.text("ab*?[]^-\\", max_size=8))
def test_a_widened_glob_matches_whatever_the_glob_does(pattern: str, text: str) -> None:
    if compile_glob(pattern).fullmatch(text):
        assert compile_glob(widen(pattern)).fullmatch(text)


def test_a_widened_glob_has_few_stars() -> None:
    assert widen("*a" * 50 + "[b]?").count("*") <= 7
    assert widen("user:?:[ab]*x") == "user:*:*x"
