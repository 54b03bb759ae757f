"""Tests of reads, with all kinds of keys and values."""

from __future__ import annotations

import pytest

from cachebus.messages import (
    CacheCapacityError,
    CacheError,
    CacheKeyError,
    Delete,
    Deleted,
    Exists,
    Failed,
    Found,
    FoundMany,
    Get,
    GetMany,
    Missing,
    Present,
    Set,
    SetMany,
    Stored,
    StoredMany,
)

from .base import MISSING, AnyStore, Conformance, ask, carry_out, value_of

ATTACK_KEYS = (
    "a b",
    " ",
    "a\tb",
    "a\r\nget b",
    "a\r\nset b 0 0 1\r\nx\r\n",
    "\r\n",
    "\x00",
    "a\x00b",
    "\x7f",
    "k" * 250,
    "k" * 251,
    "k" * 10_000,
    "ключ" * 100,
    "*",
    "?",
    "[a]",
    "[^a]",
    "\\",
    "\\*",
    "a*?[]\\b",
    "{a}b",
    "{",
    "a.b",
    "a.>",
    "$SYS.x",
    "..",
    "a:b",
    ":",
    "other:a",
    "cachebus:other:a",
    "😀",
    "e\u0301",
    "\u00e9",
    "\u202e",
    "a",
    "A",
    "1",
    "-1",
    "None",
    "noreply",
    "%00",
    "%s",
    "'; DROP TABLE x; --",
)
"""Keys with a special meaning for a protocol, a glob, a cluster, a NATS subject, or a reader."""

PLAIN_VALUES: tuple[object, ...] = (
    None,
    False,
    True,
    0,
    -1,
    2**63 - 1,
    -(2**63),
    1.5,
    -0.0,
    "",
    "text",
    "naïve ☕ \x00\r\n",
    b"",
    b"\x00\r\n\xff",
    b"5",
    [],
    [1, [b"a", None]],
    {},
    {"a": {"b": [1.5]}},
)
"""Values of all types that messages support."""


class Reading(Conformance):
    """Tests of reads. Part of `StoreConformance`."""

    async def test_a_key_that_was_never_written_is_missing(self, store: AnyStore) -> None:
        assert await ask(store, Get("a")) == Missing()
        assert await ask(store, Exists("a")) == Missing()
        assert await ask(store, GetMany(("a", "b"))) == FoundMany({})

    async def test_what_is_read_is_what_was_written(self, store: AnyStore) -> None:
        stored = await ask(store, Set("a", b"1", ttl=None))
        assert isinstance(stored, Stored)
        found = await ask(store, Get("a"))
        assert isinstance(found, Found)
        assert (found.value, found.version, found.ttl, found.tags) == (b"1", stored.version, None, ())
        assert await ask(store, Exists("a")) == Present(stored.version, None)

    async def test_many_keys_are_read_at_once_each_with_its_own_value(self, store: AnyStore) -> None:
        await ask(store, SetMany({"a": b"1", "b": b"2"}, ttl=None))
        reply = await ask(store, GetMany(("b", "none", "a", "b")))
        assert {key: found.value for key, found in reply.entries.items()} == {"a": b"1", "b": b"2"}
        for key, found in reply.entries.items():
            assert await ask(store, Get(key)) == found
        assert await ask(store, GetMany(())) == FoundMany({})

    @pytest.mark.parametrize("value", PLAIN_VALUES, ids=repr)
    async def test_a_value_comes_back_as_it_went_with_its_type(self, store: AnyStore, value: object) -> None:
        await ask(store, Set("a", value))
        read = await value_of(store, "a")
        assert read == value
        assert type(read) is type(value)

    async def test_an_empty_value_is_a_value(self, store: AnyStore) -> None:
        await ask(store, Set("a", b""))
        assert await value_of(store, "a") == b""
        assert isinstance(await ask(store, Exists("a")), Present)

    async def test_a_big_value_comes_back_whole(self, store: AnyStore) -> None:
        size = min(self.big_value, store.capabilities.max_value_bytes or self.big_value)
        value = bytes(range(251)) * (size // 251) + b"x" * (size % 251)
        await ask(store, Set("a", value))
        assert await value_of(store, "a") == value

    async def test_a_value_over_the_limit_is_refused_with_both_sizes_and_without_side_effects(
        self, store: AnyStore
    ) -> None:
        limit = store.capabilities.max_value_bytes
        if limit is None or limit > self.big_value:
            pytest.skip("the store has no limit that the suite could reach")
        await ask(store, Set("a", b"old"))
        before, refused, after = await carry_out(store, [Set("b", b"1"), Set("a", b"x" * (limit + 1)), Set("c", b"2")])
        assert isinstance(before, Stored)
        assert isinstance(after, Stored)
        assert isinstance(refused, Failed)
        error = refused.error()
        assert isinstance(error, CacheCapacityError)
        assert error.size > error.limit > 0
        assert await value_of(store, "a") == b"old"

    # Keys

    async def test_every_key_is_data_and_never_syntax(self, store: AnyStore) -> None:
        keys = self._usable(store)
        for key in keys:
            await ask(store, Set(key, key.encode()))
        for key in keys:
            assert await value_of(store, key) == key.encode()
        reply = await ask(store, GetMany(keys))
        assert {key: found.value for key, found in reply.entries.items()} == {key: key.encode() for key in keys}

    async def test_removing_one_key_leaves_every_other_alone(self, store: AnyStore) -> None:
        keys = self._usable(store)
        assert await ask(store, SetMany({key: key.encode() for key in keys})) == StoredMany(len(keys))
        for place, key in enumerate(keys):
            assert await ask(store, Delete(key)) == Deleted(1), key
            reply = await ask(store, GetMany(keys))
            assert set(reply.entries) == set(keys[place + 1 :])

    async def test_half_a_surrogate_pair_is_refused_or_kept_without_side_effects(self, store: AnyStore) -> None:
        before, odd, after = await carry_out(store, [Set("a", b"1"), Set("x\ud800", b"2"), Set("b", b"3")])
        assert isinstance(before, Stored)
        assert isinstance(after, Stored)
        if isinstance(odd, Failed):
            with pytest.raises(CacheError):
                await ask(store, Get("x\ud800"))
        else:
            assert await value_of(store, "x\ud800") == b"2"
        assert (await value_of(store, "a"), await value_of(store, "b")) == (b"1", b"3")

    async def test_a_key_over_the_limit_is_refused_and_one_of_any_length_kept_where_there_is_none(
        self, store: AnyStore
    ) -> None:
        limit = store.capabilities.max_key_bytes
        if limit is None:
            for length in (100_000, 99_999):
                await ask(store, Set("k" * length, b"%d" % length))
            assert await value_of(store, "k" * 100_000) == b"100000"
            return
        refused, stored = await carry_out(store, [Set("k" * (limit + 1), b"1"), Set("k" * limit, b"2")])
        assert isinstance(refused, Failed)
        assert isinstance(refused.error(), CacheKeyError)
        assert isinstance(stored, Stored)
        assert await value_of(store, "k" * limit) == b"2"
        assert await value_of(store, "k" * (limit - 1)) is MISSING

    def _usable(self, store: AnyStore) -> tuple[str, ...]:
        limit = store.capabilities.max_key_bytes
        return tuple(key for key in ATTACK_KEYS if limit is None or len(key.encode()) <= limit)
