"""Tests of tags: an invalidated value is missing for every request, and no load restores it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from cachebus.messages import (
    Add,
    Clear,
    CompareAndSet,
    Delete,
    Exists,
    Found,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    Incremented,
    Invalidated,
    InvalidateTags,
    LeaseGranted,
    Loaded,
    Loading,
    LoadMetadata,
    Missing,
    NotHeld,
    NotStored,
    Present,
    ReleaseLease,
    Renewed,
    RenewLease,
    Request,
    Set,
    SetMany,
    Stale,
    Stored,
    Touch,
)

from .base import AnyStore, Conformance, ask, carry_out, granted, value_of

LONG = 60.0
RED = ("red",)

STORING: dict[str, Callable[[float], Request[Any]]] = {
    "set": lambda version: Set("a", b"new", LONG, RED),
    "set if present": lambda version: Set("a", b"new", LONG, RED, "present"),
    "set many": lambda version: SetMany({"a": b"new"}, LONG, RED),
    "compare and set": lambda version: CompareAndSet("a", b"new", version, LONG, RED),
}
"""Requests that replace an existing value and set the tag `red`."""


def lease(token: str, *tags: str, ttl: float = LONG, refresh: bool = False) -> GetOrLease:
    """Return a process's request for a lease."""
    return GetOrLease("k", f"owner of {token}", token, ttl, tags=tags, refresh=refresh)


def commit(token: str, value: Any, *tags: str, **more: Any) -> Set:
    """Return a process's request to store a value under its lease."""
    return Set("k", value, tags=tags, lease=token, **more)


class Tagging(Conformance):
    """Tests of the capability `tags`. Part of `StoreConformance`."""

    @pytest.fixture
    def tagging(self, store: AnyStore) -> AnyStore:
        """Provide the store if it supports tags."""
        self.needs(store, "tags")
        return store

    # Reading and writing

    @pytest.mark.parametrize("how", STORING)
    async def test_every_way_to_store_stores_tags(self, tagging: AnyStore, how: str) -> None:
        if how == "compare and set":
            self.needs(tagging, "compare_and_set")
        before = await ask(tagging, Set("a", b"old", tags=("blue",)))
        assert isinstance(before, Stored)
        await ask(tagging, STORING[how](before.version))
        found = await ask(tagging, Get("a"))
        assert isinstance(found, Found)
        assert (found.value, found.tags) == (b"new", RED)
        assert found.ttl == pytest.approx(LONG, abs=5.0)
        assert (await ask(tagging, GetMany(("a", "b")))).entries["a"].tags == RED
        await ask(tagging, InvalidateTags(("blue",)))
        assert await value_of(tagging, "a") == b"new", "it has another tag by now"
        await ask(tagging, InvalidateTags(RED))
        assert isinstance(await ask(tagging, Get("a")), Missing)

    async def test_add_stores_tags(self, tagging: AnyStore) -> None:
        assert isinstance(await ask(tagging, Add("a", b"1", LONG, RED)), Stored)
        assert isinstance(await ask(tagging, Add("a", b"2", LONG)), NotStored)
        await ask(tagging, InvalidateTags(RED))
        assert isinstance(await ask(tagging, Add("a", b"3", LONG)), Stored), "what is invalid is absent"
        assert await value_of(tagging, "a") == b"3"

    async def test_values_of_every_kind_keep_their_tags(self, tagging: AnyStore) -> None:
        values: dict[str, Any] = {"bytes": b"", "int": -7, "list": [1, "a", None], "text": "ä", "big": bytes(300_000)}
        tags = ("with space", "ä\n*", "x" * 200, "a:b", "{a}")
        for key, value in values.items():
            await ask(tagging, Set(key, value, tags=tags))
        found = (await ask(tagging, GetMany(tuple(values)))).entries
        assert {key: each.value for key, each in found.items()} == values
        assert all(each.tags == tags for each in found.values())
        for tag in tags:
            await ask(tagging, SetMany(values, tags=tags))
            assert await ask(tagging, InvalidateTags((tag,))) == Invalidated()
            assert (await ask(tagging, GetMany(tuple(values)))).entries == {}, tag

    async def test_a_tag_is_not_its_neighbour(self, tagging: AnyStore) -> None:
        await ask(tagging, Set("a", b"1", tags=("x", "y:z")))
        await ask(tagging, InvalidateTags(("x:y", "z", "y", "", "xy")))
        assert await value_of(tagging, "a") == b"1"

    async def test_a_value_that_loses_its_tags_outlives_them(self, tagging: AnyStore) -> None:
        await ask(tagging, Set("a", b"1", tags=RED))
        await ask(tagging, Set("a", b"2"))
        await ask(tagging, InvalidateTags(RED))
        assert await value_of(tagging, "a") == b"2"

    async def test_an_invalid_entry_is_missing_for_every_request(self, tagging: AnyStore) -> None:
        stored = await ask(tagging, Set("a", 5, LONG, RED))
        assert isinstance(stored, Stored)
        assert isinstance(await ask(tagging, Exists("a")), Present)
        await ask(tagging, InvalidateTags(RED))
        assert isinstance(await ask(tagging, Exists("a")), Missing)
        assert isinstance(await ask(tagging, Touch("a", LONG)), Missing)
        assert isinstance(await ask(tagging, Set("a", 6, only_if="present")), NotStored)
        if tagging.capabilities.compare_and_set:
            assert await ask(tagging, CompareAndSet("a", 6, stored.version)) == NotStored(0.0)
        if tagging.capabilities.counters:
            assert isinstance(await ask(tagging, Increment("a", initial=None)), Missing)
            assert await ask(tagging, Increment("a", initial=10)) == Incremented(11)
            found = await ask(tagging, Get("a"))
            assert isinstance(found, Found)
            assert (found.value, found.tags) == (11, ())
            assert found.version > stored.version

    async def test_a_valid_entry_is_present_for_every_request(self, tagging: AnyStore) -> None:
        stored = await ask(tagging, Set("a", 5, LONG, RED))
        assert isinstance(stored, Stored)
        assert isinstance(await ask(tagging, Add("a", 6)), NotStored)
        assert isinstance(await ask(tagging, Set("a", 6, only_if="absent")), NotStored)
        present = await ask(tagging, Touch("a", 2 * LONG))
        assert isinstance(present, Present)
        assert present.ttl == pytest.approx(2 * LONG, abs=5.0)
        if tagging.capabilities.counters:
            assert await ask(tagging, Increment("a", 3)) == Incremented(8)
            found = await ask(tagging, Get("a"))
            assert isinstance(found, Found)
            assert (found.value, found.tags) == (8, RED)
        if tagging.capabilities.compare_and_set:
            found = await ask(tagging, Get("a"))
            assert isinstance(found, Found)
            assert isinstance(await ask(tagging, CompareAndSet("a", 7, found.version + 1.0)), NotStored)
            assert isinstance(await ask(tagging, CompareAndSet("a", 7, found.version, LONG)), Stored)
            await ask(tagging, InvalidateTags(RED))
            assert await value_of(tagging, "a") == 7, "the new value has no tag"

    async def test_touch_brings_nothing_back(self, tagging: AnyStore) -> None:
        await ask(tagging, Set("a", b"1", LONG, RED))
        await ask(tagging, InvalidateTags(RED))
        for _ in range(2):
            assert isinstance(await ask(tagging, Touch("a", 2 * LONG)), Missing)
        await ask(tagging, Set("b", b"2", LONG, RED))
        assert isinstance(await ask(tagging, Get("a")), Missing)
        assert await value_of(tagging, "b") == b"2"

    async def test_requests_of_one_batch_take_effect_in_their_order(self, tagging: AnyStore) -> None:
        batch = [
            *(Set("a", b"1", tags=RED), Get("a"), Set("b", b"2"), InvalidateTags(RED), Get("a"), Get("b")),
            *(Set("a", b"3", tags=RED), Get("a"), Delete("a"), Get("a")),
        ]
        for _ in range(3):
            replies: Any = []
            for request in batch:  # In a cluster, requests for keys in different slots have no order.
                replies += await carry_out(tagging, [request])
            values = [getattr(reply, "value", None) for reply in replies]
            assert values == [None, b"1", None, None, None, b"2", None, b"3", None, None]
        many = [Set("a", number, tags=(f"t{number}",)) for number in range(20)]
        assert all(isinstance(reply, Stored) for reply in await carry_out(tagging, many))
        await ask(tagging, InvalidateTags(tuple(f"t{number}" for number in range(19))))
        assert await value_of(tagging, "a") == 19

    async def test_clear_leaves_nothing_that_has_tags(self, tagging: AnyStore) -> None:
        await ask(tagging, SetMany({"a": b"1", "b": b"2"}, tags=RED))
        await ask(tagging, Clear())
        assert (await ask(tagging, GetMany(("a", "b")))).entries == {}
        await ask(tagging, Set("a", b"3", tags=RED))
        assert await value_of(tagging, "a") == b"3"

    async def test_the_tags_of_a_namespace_are_its_own(self, tagging: AnyStore, neighbour: AnyStore) -> None:
        for one, other in ((tagging, neighbour), (neighbour, tagging)):
            await ask(one, Set("a", b"goes", tags=RED))
            await ask(other, Set("a", b"stays", tags=RED))
            await ask(one, InvalidateTags(RED))
            assert isinstance(await ask(one, Get("a")), Missing)
            assert await value_of(other, "a") == b"stays"

    async def test_many_write_and_invalidate_at_once(self, tagging: AnyStore) -> None:
        """Values stored before an invalidation began are missing after it."""
        for round_ in range(10):
            await ask(tagging, SetMany({f"k{number}": round_ for number in range(50)}, tags=RED))
            async with anyio.create_task_group() as group:
                group.start_soon(ask, tagging, InvalidateTags(RED))
                for number in range(20):
                    group.start_soon(ask, tagging, Set(f"n{number}", round_, tags=RED))
            assert (await ask(tagging, GetMany(tuple(f"k{number}" for number in range(50))))).entries == {}

    # Loading

    @pytest.fixture
    def loading(self, tagging: AnyStore) -> AnyStore:
        """Provide the store if it also supports leases."""
        self.needs(tagging, "leases")
        return tagging

    async def test_what_is_loaded_has_its_tags(self, loading: AnyStore) -> None:
        t1 = await granted(loading, lease("t1", "red"))
        assert isinstance(
            await ask(loading, commit(t1, b"v", "red", "late", metadata=LoadMetadata(0.5, LONG, "e"))), Stored
        )
        for found in (await ask(loading, Get("k")), await ask(loading, lease("t2", "red"))):
            assert isinstance(found, Loaded)
            assert (found.value, found.tags, found.etag) == (b"v", ("red", "late"), "e")
        await ask(loading, InvalidateTags(("late",)))
        assert isinstance(await ask(loading, Get("k")), Missing)
        t3 = await granted(loading, lease("t3", "red"))
        assert await ask(loading, lease("t3", "red")) == LeaseGranted(t3), "and nothing is served stale"

    @pytest.mark.parametrize("known", ["from the beginning", "at the end"])
    @pytest.mark.parametrize("refresh", [False, True])
    async def test_invalidating_a_tag_during_a_load_revokes_its_lease(
        self, loading: AnyStore, known: str, refresh: bool
    ) -> None:
        if refresh:
            await ask(loading, Set("k", b"live", LONG))
        declared = RED if known == "from the beginning" else ()
        for number in range(3):
            token = await granted(loading, lease(f"t{number}", *declared, refresh=refresh))
            await ask(loading, InvalidateTags(("other", "red")))
            refused = await ask(loading, commit(token, b"out of date", "red"))
            assert isinstance(refused, NotStored)
            assert refused.reason == "lease_lost"
            assert await value_of(loading, "k") == (b"live" if refresh else await value_of(loading, "none"))
        t9 = await granted(loading, lease("t9", *declared, refresh=refresh))
        assert isinstance(await ask(loading, commit(t9, b"new", "red")), Stored)
        assert await value_of(loading, "k") == b"new"

    async def test_invalidating_another_tag_revokes_nothing(self, loading: AnyStore) -> None:
        await ask(loading, InvalidateTags(RED))
        t1 = await granted(loading, lease("t1", "red"))
        await ask(loading, InvalidateTags(("blue",)))
        assert await ask(loading, RenewLease("k", t1, LONG)) == Renewed(LONG)
        assert isinstance(await ask(loading, commit(t1, b"v", "red")), Stored)
        assert await value_of(loading, "k") == b"v"

    async def test_a_caller_after_the_invalidation_does_not_wait_for_an_earlier_load(self, loading: AnyStore) -> None:
        t1 = await granted(loading, lease("t1", "red"))
        assert isinstance(await ask(loading, lease("t2", "red")), Loading)
        await ask(loading, InvalidateTags(RED))
        assert isinstance(await ask(loading, RenewLease("k", t1, LONG)), NotHeld)
        t3 = await granted(loading, lease("t3", "red"))
        assert isinstance(await ask(loading, lease("t4", "red")), Loading)
        refused = await ask(loading, commit(t1, b"out of date", "red"))
        assert isinstance(refused, NotStored)
        assert isinstance(await ask(loading, commit(t3, b"v", "red")), Stored)
        assert await value_of(loading, "k") == b"v"

    async def test_a_lease_whose_tag_is_invalidated_is_not_held(self, loading: AnyStore) -> None:
        t1 = await granted(loading, lease("t1", "red"))
        await ask(loading, InvalidateTags(RED))
        await ask(loading, ReleaseLease("k", t1))
        assert isinstance(await ask(loading, commit(t1, b"v")), NotStored)
        assert isinstance(await ask(loading, lease("t2", "red")), LeaseGranted)

    async def test_an_invalid_entry_is_reloaded_by_one_caller(self, loading: AnyStore) -> None:
        stored = await ask(loading, Set("k", b"old", LONG, RED))
        assert isinstance(stored, Stored)
        assert isinstance(await ask(loading, lease("t0", "red")), Found)
        await ask(loading, InvalidateTags(RED))
        t1 = await granted(loading, lease("t1", "red"))
        assert isinstance(await ask(loading, lease("t2", "red")), Loading)
        new = await ask(loading, commit(t1, b"new", "red", ttl=LONG))
        assert isinstance(new, Stored)
        assert await value_of(loading, "k") == b"new"

    @pytest.mark.parametrize("during", ["before a load", "during a load"])
    async def test_what_is_invalidated_is_not_served_stale(self, loading: AnyStore, during: str) -> None:
        t1 = await granted(loading, lease("t1", "red"))
        await ask(loading, commit(t1, b"old", "red", ttl=self.short_ttl, metadata=LoadMetadata(0.5, LONG)))
        await self.expire(loading)
        if during == "during a load":
            mine = await ask(loading, lease("t2"))
            assert isinstance(mine, LeaseGranted)
            assert isinstance(mine.stale, Stale)
            assert (mine.stale.value, mine.stale.tags) == (b"old", RED)
        await ask(loading, InvalidateTags(RED))
        reply = await ask(loading, lease("t3"))
        if during == "during a load":
            assert isinstance(reply, Loading)
            await ask(loading, ReleaseLease("k", "t2"))
            reply = await ask(loading, lease("t4"))
        assert isinstance(reply, LeaseGranted)
        assert reply.stale is None

    async def test_a_valid_value_with_tags_is_served_stale(self, loading: AnyStore) -> None:
        t1 = await granted(loading, lease("t1", "red"))
        await ask(loading, commit(t1, b"old", "red", ttl=self.short_ttl, metadata=LoadMetadata(0.5, LONG, "e")))
        await self.expire(loading)
        assert isinstance(await ask(loading, Get("k")), Missing)
        assert isinstance(await ask(loading, Exists("k")), Missing)
        await ask(loading, InvalidateTags(("blue",)))
        mine = await ask(loading, lease("t2", "red"))
        assert isinstance(mine, LeaseGranted)
        reply = await ask(loading, lease("t3", "red"))
        for stale in (mine.stale, reply):
            assert isinstance(stale, Stale)
            assert (stale.value, stale.tags, stale.etag) == (b"old", RED, "e")
