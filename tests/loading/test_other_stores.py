"""Loads over stores without leases or without waiting, and loads of a second cache on the same backend."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
import pytest

from cachebus import Cache, CacheError, open_cache
from cachebus.adapters.chaos import ChaosStore
from cachebus.adapters.memory.store import MemoryStore
from cachebus.adapters.null import NullStore

from ..facade.faces import a_cache, settings
from .quiet import quiet
from .slow import Slow


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    async with a_cache() as cache:
        yield cache


def as_elsewhere(cache: Cache) -> Cache:
    """Separate cache on the same backend, as in another process."""
    return Cache(lambda: pytest.fail("it has a link, and makes no node")).attach(cache.client)


def asking(load: Slow, values: list[Any]) -> Callable[[Cache], Coroutine[Any, Any, None]]:
    """Return a function that requests the value of `load` from a cache and records it."""

    async def call(cache: Cache) -> None:
        values.append(await cache.get_or_load("k", load))

    return call


async def test_a_store_without_leases_has_one_load_in_each_process() -> None:
    load = Slow()
    values: list[Any] = []
    call = asking(load, values)

    async with open_cache(settings(), stores=lambda _: NullStore()) as cache:
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(call, cache)
            await load.begun.wait()
            await anyio.wait_all_tasks_blocked()
            load.go_on.set()
        assert values == ["value"] * 10
        assert load.calls == 1
        assert await cache.get_or_load_many(["a", "b"], lambda keys: dict.fromkeys(keys, 1)) == {"a": 1, "b": 1}
        assert cache.loads.table.unleased == {}


async def test_a_store_that_lets_nobody_wait_is_asked_again_and_again() -> None:
    # The chaos store replies for the memory store, without deferred replies.
    store = ChaosStore(MemoryStore(), seed=1)
    load = Slow()
    values: list[Any] = []
    call = asking(load, values)

    async with open_cache(settings(), stores=lambda _: store) as cache:
        other = as_elsewhere(cache)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, cache)
            await load.begun.wait()
            for _ in range(20):
                tasks.start_soon(call, other)
            before = store.counts.operations
            await anyio.sleep(0.1)
            asked = store.counts.operations - before
            load.go_on.set()
    assert values == ["value"] * 21
    assert 20 < asked < 45, "each reads once, two ask for all of them, and one goes on asking, ever more slowly"


async def test_two_caches_at_one_memory_backend_share_a_load_by_waiting(cache: Cache) -> None:
    other = as_elsewhere(cache)
    load = Slow()
    values: list[Any] = []
    call = asking(load, values)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, cache)
        await load.begun.wait()
        for _ in range(20):
            tasks.start_soon(call, other)
        await anyio.wait_all_tasks_blocked()
        load.go_on.set()
    assert values == ["value"] * 21
    assert load.calls == 1
    await quiet(other)
    await quiet(cache)


async def test_the_error_of_a_loader_elsewhere_says_what_it_raised(cache: Cache) -> None:
    other = as_elsewhere(cache)
    load = Slow(LookupError("with a secret in it"))
    errors: list[str] = []

    async def call(of: Cache) -> None:
        try:
            await of.get_or_load("k", load)
        except (LookupError, CacheError) as error:
            errors.append(str(error))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, cache)
        await load.begun.wait()
        tasks.start_soon(call, other)
        await anyio.wait_all_tasks_blocked()
        load.go_on.set()
    assert sorted(errors) == ["the loader in another process raised LookupError", "with a secret in it"]


async def test_when_whoever_loads_gives_up_one_of_those_who_wait_loads(cache: Cache) -> None:
    other = as_elsewhere(cache)
    begun = anyio.Event()
    values: list[Any] = []

    async def never() -> None:
        begun.set()
        await anyio.sleep_forever()

    async def call() -> None:
        values.append(await other.get_or_load("k", lambda: "other's"))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            leading = anyio.CancelScope()

            async def lead() -> None:
                with leading:
                    await cache.get_or_load("k", never)

            tasks.start_soon(lead)
            await begun.wait()
            tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            leading.cancel()
    assert values == ["other's"]
    assert await cache.get("k") == "other's"
