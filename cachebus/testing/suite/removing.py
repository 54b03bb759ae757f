"""Tests of bulk removal: by pattern, by tag, and of a whole namespace."""

from __future__ import annotations

import pytest

from cachebus.messages import (
    CapabilityError,
    Clear,
    Cleared,
    CompareAndSet,
    Deleted,
    DeletePattern,
    Failed,
    GetMany,
    Increment,
    Invalidated,
    InvalidateTags,
    Request,
    Scan,
    Set,
    SetMany,
)

from .base import MISSING, AnyStore, Conformance, all_keys, ask, carry_out, value_of
from .reading import ATTACK_KEYS

FOREST = ("user:1:a", "user:12:a", "user:1:b", "user:*:a", "user:[1]:a", "user:?:a", "user:\\1:a", "USER:1:a", "other")
"""Keys to match against patterns."""

CHOICES = (
    ("*", FOREST),
    ("user:*", FOREST[:7]),
    ("user:?:a", ("user:1:a", "user:*:a", "user:?:a")),
    ("user:[12]:a", ("user:1:a",)),
    ("user:[^1]:a", ("user:*:a", "user:?:a")),
    ("user:\\*:a", ("user:*:a",)),
    ("user:\\?:a", ("user:?:a",)),
    ("user:\\[1\\]:a", ("user:[1]:a",)),
    ("user:\\\\1:a", ("user:\\1:a",)),
    ("*:a", tuple(key for key in FOREST if key.endswith(":a"))),
    ("user:1", ()),
    ("", ()),
)
"""Patterns and the keys of `FOREST` that each of them matches."""


def _name(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


class Removing(Conformance):
    """Tests of bulk removal. Part of `StoreConformance`."""

    @pytest.mark.parametrize(("pattern", "chosen"), CHOICES)
    async def test_a_pattern_matches_the_expected_keys(
        self, store: AnyStore, pattern: str, chosen: tuple[str, ...]
    ) -> None:
        self.needs(store, "patterns")
        await ask(store, SetMany(dict.fromkeys(FOREST, b"1")))
        assert await all_keys(store, pattern) == set(chosen)
        assert await ask(store, DeletePattern(pattern)) == Deleted(len(chosen))
        assert set((await ask(store, GetMany(FOREST))).entries) == set(FOREST) - set(chosen)

    async def test_an_escaped_key_chooses_itself_and_no_other(self, store: AnyStore) -> None:
        self.needs(store, "patterns")
        limit = store.capabilities.max_key_bytes
        keys = [key for key in ATTACK_KEYS if limit is None or len(key.encode()) <= limit]
        await ask(store, SetMany(dict.fromkeys(keys, b"1")))
        for place, key in enumerate(keys):
            pattern = "".join(f"\\{each}" if each in "*?[]\\^-" else each for each in key)
            assert await ask(store, DeletePattern(pattern)) == Deleted(1), key
            assert len((await ask(store, GetMany(tuple(keys)))).entries) == len(keys) - place - 1

    async def test_a_scan_finds_every_key_of_a_thousand(self, store: AnyStore) -> None:
        self.needs(store, "patterns")
        await ask(store, SetMany({f"k{number}": number for number in range(1000)}))
        await ask(store, Set("other", b"1"))
        assert await all_keys(store, "k*") == {f"k{number}" for number in range(1000)}
        assert await ask(store, DeletePattern("k*")) == Deleted(1000)
        assert await all_keys(store, "*") == {"other"}

    # Namespaces

    async def test_clear_leaves_nothing(self, store: AnyStore) -> None:
        await ask(store, SetMany({f"k{number}": number for number in range(1000)}))
        assert await ask(store, Clear()) == Cleared()
        assert (await ask(store, GetMany(tuple(f"k{number}" for number in range(1000))))).entries == {}
        await ask(store, Set("k1", b"new"))
        assert await value_of(store, "k1") == b"new"

    async def test_two_namespaces_have_two_values_under_one_key(self, store: AnyStore, neighbour: AnyStore) -> None:
        await ask(store, Set("a", b"ours"))
        assert await value_of(neighbour, "a") is MISSING
        await ask(neighbour, Set("a", b"theirs"))
        assert await value_of(store, "a") == b"ours"
        assert await value_of(neighbour, "a") == b"theirs"

    async def test_clear_touches_no_other_namespace(self, store: AnyStore, neighbour: AnyStore) -> None:
        for one, other in ((store, neighbour), (neighbour, store)):
            await ask(one, Set("a", b"goes"))
            await ask(other, Set("a", b"stays"))
            await ask(one, Clear())
            assert await value_of(one, "a") is MISSING
            assert await value_of(other, "a") == b"stays"

    async def test_a_pattern_matches_in_no_other_namespace(self, store: AnyStore, neighbour: AnyStore) -> None:
        self.needs(store, "patterns")
        for one, other in ((store, neighbour), (neighbour, store)):
            for pattern in ("*", "*a", "?*", "[^x]*"):
                await ask(one, Set("aa", b"goes"))
                await ask(other, Set("aa", b"stays"))
                assert await all_keys(one, pattern) == {"aa"}
                assert await ask(one, DeletePattern(pattern)) == Deleted(1)
                assert await value_of(other, "aa") == b"stays"

    # Tags

    async def test_invalidating_a_tag_removes_what_carries_it_and_nothing_else(self, store: AnyStore) -> None:
        self.needs(store, "tags")
        await ask(store, Set("a", b"1", tags=("red", "big")))
        await ask(store, Set("b", b"2", tags=("blue",)))
        await ask(store, SetMany({"c": b"3", "d": b"4"}, tags=("red",)))
        await ask(store, Set("red", b"5"))
        assert await ask(store, InvalidateTags(("red", "none"))) == Invalidated()
        reply = await ask(store, GetMany(("a", "b", "c", "d", "red")))
        assert {key: (found.value, found.tags) for key, found in reply.entries.items()} == {
            "b": (b"2", ("blue",)),
            "red": (b"5", ()),
        }

    async def test_what_is_written_after_an_invalidation_lives(self, store: AnyStore) -> None:
        self.needs(store, "tags")
        await ask(store, InvalidateTags(("red",)))
        await ask(store, Set("a", b"1", tags=("red",)))
        assert await value_of(store, "a") == b"1"

    # Capabilities

    @pytest.mark.parametrize(
        ("capability", "request_"),
        [
            ("patterns", Scan("*")),
            ("patterns", DeletePattern("*")),
            ("tags", InvalidateTags(("red",))),
            ("tags", Set("b", b"1", tags=("red",))),
            ("tags", SetMany({"b": b"1"}, tags=("red",))),
            ("compare_and_set", CompareAndSet("a", b"2", 0.0)),
            ("counters", Increment("a")),
        ],
        ids=_name,
    )
    async def test_unsupported_requests_raise_capability_error_and_change_nothing(
        self, store: AnyStore, capability: str, request_: Request[object]
    ) -> None:
        await ask(store, Set("a", b"1"))
        (reply,) = await carry_out(store, [request_])
        unsupported = isinstance(reply, Failed) and isinstance(reply.error(), CapabilityError)
        assert unsupported is not getattr(store.capabilities, capability)
        if not unsupported:
            return
        assert await value_of(store, "a") == b"1"
        assert await value_of(store, "b") is MISSING
