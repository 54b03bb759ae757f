"""Tests of writes: conditions, versions, and races for one key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio

from cachebus.messages import (
    Add,
    CompareAndSet,
    Delete,
    Deleted,
    DeleteMany,
    Exists,
    Found,
    Get,
    GetMany,
    NotStored,
    Present,
    Reply,
    Request,
    Set,
    SetMany,
    Stored,
    StoredMany,
    Touch,
)

from .base import MISSING, AnyStore, Conformance, ask, carry_out, value_of


class Writing(Conformance):
    """Tests of writes. Part of `StoreConformance`."""

    async def test_only_if_absent_stores_where_there_is_nothing_and_nowhere_else(self, store: AnyStore) -> None:
        first = await ask(store, Set("a", b"1", only_if="absent"))
        assert isinstance(first, Stored)
        assert await ask(store, Set("a", b"2", only_if="absent")) == NotStored(first.version)
        assert await value_of(store, "a") == b"1"

    async def test_only_if_present_stores_where_there_is_something_and_nowhere_else(self, store: AnyStore) -> None:
        assert await ask(store, Set("a", b"1", only_if="present")) == NotStored(0.0)
        assert await value_of(store, "a") is MISSING
        await ask(store, Set("a", b"1"))
        assert isinstance(await ask(store, Set("a", b"2", only_if="present")), Stored)
        assert await value_of(store, "a") == b"2"

    async def test_add_is_for_keys_that_are_not_there(self, store: AnyStore) -> None:
        added = await ask(store, Add("a", b"1", ttl=60.0))
        assert isinstance(added, Stored)
        assert await ask(store, Add("a", b"2")) == NotStored(added.version)
        assert await value_of(store, "a") == b"1"
        await ask(store, Delete("a"))
        assert isinstance(await ask(store, Add("a", b"3")), Stored)

    async def test_one_of_many_concurrent_adds_succeeds(self, store: AnyStore) -> None:
        replies = await at_once(store, [[Add("a", b"%d" % number)] for number in range(50)])
        winners = [number for number, (reply,) in enumerate(replies) if isinstance(reply, Stored)]
        assert len(winners) == 1
        assert await value_of(store, "a") == b"%d" % winners[0]

    async def test_a_removal_returns_the_number_of_removed_keys(self, store: AnyStore) -> None:
        await ask(store, SetMany({"a": b"1", "b": b"2", "c": b"3"}))
        assert await ask(store, Delete("a")) == Deleted(1)
        assert await ask(store, Delete("a")) == Deleted(0)
        assert await ask(store, DeleteMany(("a", "b", "b", "none"))) == Deleted(1)
        assert await ask(store, DeleteMany(())) == Deleted(0)
        assert await value_of(store, "b") is MISSING
        assert await value_of(store, "c") == b"3"

    async def test_many_are_stored_at_once_each_under_its_key(self, store: AnyStore) -> None:
        assert await ask(store, SetMany({f"k{number}": number for number in range(500)})) == StoredMany(500)
        reply = await ask(store, GetMany(tuple(f"k{number}" for number in range(500))))
        assert {key: found.value for key, found in reply.entries.items()} == {f"k{n}": n for n in range(500)}
        assert await ask(store, SetMany({})) == StoredMany(0)

    # Versions

    async def test_versions_grow_with_every_write_and_over_a_removal(self, store: AnyStore) -> None:
        versions: list[float] = []

        async def note() -> None:
            found = await ask(store, Get("a"))
            assert isinstance(found, Found)
            versions.append(found.version)

        for request in (Set("a", b"1"), Set("a", b"1"), Set("a", b"2", only_if="present"), SetMany({"a": b"3"})):
            await ask(store, request)
            await note()
        if store.capabilities.compare_and_set:
            assert isinstance(await ask(store, CompareAndSet("a", b"4", versions[-1])), Stored)
            await note()
        await ask(store, Delete("a"))
        await ask(store, Add("a", b"5"))
        await note()
        assert versions == sorted(set(versions)), "each version is larger than the one before"
        assert versions[0] > 0

    async def test_reading_and_touching_leave_the_version(self, store: AnyStore) -> None:
        stored = await ask(store, Set("a", b"1"))
        assert isinstance(stored, Stored)
        await ask(store, Touch("a", None))
        assert await ask(store, Exists("a")) == Present(stored.version, None)
        found = await ask(store, Get("a"))
        assert isinstance(found, Found)
        assert found.version == stored.version

    # Compare and set

    async def test_compare_and_set_stores_over_the_version_that_was_read_and_over_no_other(
        self, store: AnyStore
    ) -> None:
        self.needs(store, "compare_and_set")
        first = await ask(store, Set("a", b"1"))
        second = await ask(store, CompareAndSet("a", b"2", first.version, ttl=60.0))
        assert isinstance(second, Stored)
        assert await ask(store, CompareAndSet("a", b"3", first.version)) == NotStored(second.version)
        found = await ask(store, Get("a"))
        assert isinstance(found, Found)
        assert (found.value, found.version) == (b"2", second.version)
        assert found.ttl is not None
        assert found.ttl <= 60.0

    async def test_compare_and_set_of_a_missing_key_stores_nothing(self, store: AnyStore) -> None:
        self.needs(store, "compare_and_set")
        assert await ask(store, CompareAndSet("a", b"1", 0.0)) == NotStored(0.0)
        assert await value_of(store, "a") is MISSING

    async def test_a_value_that_went_and_came_back_is_another_version(self, store: AnyStore) -> None:
        self.needs(store, "compare_and_set")
        first = await ask(store, Set("a", b"1"))
        await ask(store, Delete("a"))
        second = await ask(store, Set("a", b"1"))
        assert await ask(store, CompareAndSet("a", b"2", first.version)) == NotStored(second.version)

    async def test_one_of_many_concurrent_compare_and_sets_succeeds(self, store: AnyStore) -> None:
        self.needs(store, "compare_and_set")
        first = await ask(store, Set("a", b"0"))
        batches = [[CompareAndSet("a", b"%d" % number, first.version)] for number in range(50)]
        replies = await at_once(store, batches)
        winners = [number for number, (reply,) in enumerate(replies) if isinstance(reply, Stored)]
        assert len(winners) == 1
        assert await value_of(store, "a") == b"%d" % winners[0]

    async def test_a_number_that_many_raise_by_compare_and_set_loses_nothing(self, store: AnyStore) -> None:
        self.needs(store, "compare_and_set")
        await ask(store, Set("a", 0))

        async def raise_it() -> None:
            while True:
                found = await ask(store, Get("a"))
                assert isinstance(found, Found)
                if isinstance(await ask(store, CompareAndSet("a", found.value + 1, found.version)), Stored):
                    return

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(raise_it)
        assert await value_of(store, "a") == 10


async def at_once(store: AnyStore, batches: Sequence[Sequence[Request[Any]]]) -> list[list[Reply]]:
    """Execute batches concurrently and return their replies."""
    replies: list[list[Reply]] = [[] for _ in batches]

    async def run(place: int) -> None:
        replies[place] = list(await carry_out(store, batches[place]))

    async with anyio.create_task_group() as tasks:
        for place in range(len(batches)):
            tasks.start_soon(run, place)
    return replies
