"""`get_or_load_many`: one loader call, for the keys that are not being loaded."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from cachebus import Cache, LoadResult

from ..clock import ManualClock
from ..facade.faces import a_cache, a_sync_cache


class Table:
    """Loader of many keys that records its arguments."""

    def __init__(self, *without: str) -> None:
        self.asked: list[list[str]] = []
        self.without = without
        self.begun = anyio.Event()
        self.go_on = anyio.Event()
        self.go_on.set()

    async def __call__(self, keys: list[str]) -> dict[str, Any]:
        self.asked.append(keys)
        self.begun.set()
        await self.go_on.wait()
        return {key: key.upper() for key in keys if key not in self.without}

    async def one(self, key: str) -> Any:
        return (await self([key]))[key]


async def test_one_call_for_only_the_missing_keys(cache: Cache) -> None:
    table = Table()
    await cache.set("b", "there")
    values = await cache.get_or_load_many(["a", "b", "c", "a"], table, ttl=7)
    assert values == {"a": "A", "b": "there", "c": "C"}
    assert list(values) == ["a", "b", "c"], "in the order of the keys"
    assert table.asked == [["a", "c"]]
    assert await cache.ttl("a") == 7.0
    assert await cache.get_or_load_many(["a", "c"], table) == {"a": "A", "c": "C"}
    assert len(table.asked) == 1
    assert await cache.get_or_load_many([], table) == {}


async def test_keys_that_the_loader_leaves_out_are_left_out_and_can_be_loaded_at_once(cache: Cache) -> None:
    table = Table("b")
    assert await cache.get_or_load_many(["a", "b"], table) == {"a": "A"}
    assert await cache.get_or_load("b", lambda: "mine") == "mine"


async def test_overlapping_calls_load_each_key_once(cache: Cache) -> None:
    table = Table()
    table.go_on = anyio.Event()
    results: list[dict[str, Any]] = []

    async def call(*keys: str) -> None:
        results.append(await cache.get_or_load_many(keys, table))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, "a", "b")
        tasks.start_soon(call, "b", "c")
        tasks.start_soon(call, "c", "a")
        tasks.start_soon(cache.get_or_load, "b", lambda: table.one("b"))
        await anyio.wait_all_tasks_blocked()
        table.go_on.set()
    assert sorted(key for keys in table.asked for key in keys) == ["a", "b", "c"]
    assert sorted(sorted(result.items()) for result in results) == [
        [("a", "A"), ("b", "B")],
        [("a", "A"), ("c", "C")],
        [("b", "B"), ("c", "C")],
    ]
    await anyio.wait_all_tasks_blocked()
    assert cache.loads.table.in_flight == {}


async def test_who_joins_for_a_key_that_is_left_out_loads_by_itself(cache: Cache) -> None:
    table = Table("b")
    table.go_on = anyio.Event()
    values: list[Any] = []

    async def call() -> None:
        values.append(await cache.get_or_load("b", lambda: "mine"))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cache.get_or_load_many, ["a", "b"], table)
        await table.begun.wait()
        tasks.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        table.go_on.set()
    assert values == ["mine"]


async def test_what_is_invalidated_meanwhile_is_not_stored(cache: Cache) -> None:
    async def load(keys: list[str]) -> dict[str, Any]:
        await cache.delete("a")
        await cache.invalidate_tags("b's")
        return {key: LoadResult(key.upper(), tags=[f"{key}'s"]) for key in keys}

    assert await cache.get_or_load_many(["a", "b", "c"], load) == {"a": "A", "b": "B", "c": "C"}
    assert await cache.get_many(["a", "b", "c"]) == {"c": "C"}


async def test_an_error_is_raised_unless_all_can_be_served_stale(cache: Cache, clock: ManualClock) -> None:
    async def fail(keys: list[str]) -> dict[str, Any]:
        raise LookupError

    await cache.get_or_load_many(["a", "b"], Table(), ttl=1, stale_for=10)
    clock.advance(1)
    assert await cache.get_or_load_many(["a", "b"], fail) == {"a": "A", "b": "B"}
    with pytest.raises(LookupError):
        await cache.get_or_load_many(["a", "b", "c"], fail)
    assert await cache.get_or_load_many(["a", "b", "c"], Table()) == {"a": "A", "b": "B", "c": "C"}, "at once"


def test_the_synchronous_cache_does_it_too() -> None:
    asked: list[list[str]] = []

    def load(keys: list[str]) -> dict[str, str]:
        asked.append(keys)
        return {key: key.upper() for key in keys}

    with a_sync_cache() as cache:
        cache.set("b", "there")
        assert cache.get_or_load_many(["a", "b", "c"], load) == {"a": "A", "b": "there", "c": "C"}
        assert cache.get_or_load_many(["d"], Table()) == {"d": "D"}
    assert asked == [["a", "c"]]


async def test_keys_for_which_there_is_no_room_to_lease_are_loaded_and_not_stored(clock: ManualClock) -> None:
    async with a_cache(clock=clock, max_leases=1) as cache:
        slow, table = Table(), Table()
        slow.go_on = anyio.Event()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cache.get_or_load, "x", lambda: slow.one("x"))
            await slow.begun.wait()
            assert await cache.get_or_load_many(["a", "b"], table) == {"a": "A", "b": "B"}
            assert await cache.get_many(["a", "b"]) == {}, "an invalidation during the load would not have been seen"
            slow.go_on.set()
        assert await cache.get_or_load_many(["a"], table) == {"a": "A"}
        assert await cache.get_many(["a"]) == {"a": "A"}


async def test_the_limit_of_waiting_is_one_for_all_keys() -> None:
    go_on = anyio.Event()
    keys = [f"k{number}" for number in range(8)]

    async def hold() -> str:
        await go_on.wait()
        return "held"

    async with a_cache() as cache, anyio.create_task_group() as tasks:
        for key in keys:
            tasks.start_soon(cache.get_or_load, key, hold)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(1.5):  # Less than half of eight times that limit.
            values = await cache.get_or_load_many(keys, Table(), wait_limit=0.4)
        go_on.set()
    assert values == {key: key.upper() for key in keys}
