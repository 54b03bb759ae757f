"""Failures of decorated functions, and the callers that see them."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest

from cachebus import (
    CacheClosed,
    CacheError,
    SyncCache,
)

from .faces import a_cache, a_sync_cache
from .loaders import Loader


async def test_an_error_goes_to_everybody_who_waits_and_nothing_is_stored() -> None:
    loader = Loader()
    errors: list[Exception] = []
    async with a_cache() as cache:

        @cache.cached(key="key")
        async def load() -> str:
            await loader("key")
            if loader.calls == 1:
                raise LookupError("no such row")
            return "found"

        async def call() -> None:
            try:
                await load()
            except LookupError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            loader.go_on.set()
        assert [str(error) for error in errors] == ["no such row"] * 20
        assert loader.calls == 1
        assert await cache.exists("key") is False
        assert await load() == "found"


def test_an_error_goes_to_every_thread_that_waits(sync_cache: SyncCache) -> None:
    calls = 0
    begun, go_on = threading.Event(), threading.Event()

    @sync_cache.cached(key="key")
    def load() -> str:
        nonlocal calls
        calls += 1
        begun.set()
        go_on.wait()
        if calls == 1:
            raise LookupError("no such row")
        return "found"

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(load)
        begun.wait()
        (in_flight,) = sync_cache.loads.table.in_flight.values()
        loads = [pool.submit(load) for _ in range(7)]
        while in_flight.waiters < 8:
            pass
        go_on.set()
        errors = [each.exception() for each in (first, *loads)]
    assert [repr(error) for error in errors] == ["LookupError('no such row')"] * 8
    assert load() == "found"
    assert sync_cache.loads.table.in_flight == {}


@pytest.mark.parametrize("cancelled", ["the leader", "a waiter", "all but the last"])
async def test_cancelling_some_does_not_cancel_the_load_for_the_others(cancelled: str) -> None:
    loader = Loader()
    values: dict[int, str] = {}
    scopes = [anyio.CancelScope() for _ in range(5)]
    gone = {"the leader": [0], "a waiter": [2], "all but the last": [0, 1, 2, 3]}[cancelled]
    async with a_cache() as cache:

        @cache.cached(key="key")
        async def load() -> str:
            return await loader("key")

        async def call(number: int) -> None:
            with scopes[number]:
                values[number] = await load()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, 0)
            await loader.begun.wait()
            for number in range(1, 5):
                tasks.start_soon(call, number)
            await anyio.wait_all_tasks_blocked()
            for number in gone:
                scopes[number].cancel()
                await anyio.wait_all_tasks_blocked()
            loader.go_on.set()
        assert set(values) == set(range(5)) - set(gone)
        assert len(set(values.values())) == 1
        assert loader.calls == 1
        assert await cache.get("key") == values[4]
        assert cache.loads.table.in_flight == {}


async def test_cancelling_all_leaves_nothing_behind() -> None:
    loader = Loader()
    async with a_cache() as cache:

        @cache.cached(key="key")
        async def load() -> str:
            return await loader("key")

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(load)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert cache.loads.table.in_flight == {}
        assert await cache.exists("key") is False
        loader.go_on.set()
        assert await load() == f"key {loader.calls}"


def test_when_the_loading_thread_is_interrupted_another_one_loads(sync_cache: SyncCache) -> None:
    calls = 0
    begun, go_on = threading.Event(), threading.Event()

    @sync_cache.cached(key="key")
    def load() -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            begun.set()
            go_on.wait()
            raise KeyboardInterrupt
        return calls

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(load)
        begun.wait()
        (in_flight,) = sync_cache.loads.table.in_flight.values()
        second = pool.submit(load)
        while in_flight.waiters < 2:
            pass
        go_on.set()
        assert second.result() == 2
        assert isinstance(first.exception(), KeyboardInterrupt)
    assert sync_cache.get("key") == 2


async def test_a_loader_that_asks_for_its_own_key_is_told_so() -> None:
    async with a_cache() as cache:

        @cache.cached(key="n:{n}")
        async def load(n: int) -> int:
            return 1 + await other(n)

        @cache.cached(key="m:{n}")
        async def other(n: int) -> int:
            return 1 + await load(n)

        with pytest.raises(CacheError, match="a loader requested the key that it is loading"):
            await load(1)

        @cache.cached(key="f:{n}")
        async def factorial(n: int) -> int:
            return n * await factorial(n - 1) if n else 1

        assert await factorial(20) == 2_432_902_008_176_640_000
        assert cache.loads.table.in_flight == {}


def test_a_plain_loader_that_asks_for_its_own_key_is_told_so(sync_cache: SyncCache) -> None:
    @sync_cache.cached(key="n:{n}")
    def load(n: int) -> int:
        return 1 + load(n)

    with pytest.raises(CacheError, match="a loader requested the key that it is loading"):
        load(1)

    @sync_cache.cached(key="f:{n}")
    def factorial(n: int) -> int:
        return n * factorial(n - 1) if n else 1

    assert factorial(20) == 2_432_902_008_176_640_000


async def test_a_plain_call_on_the_loop_that_loads_the_key_is_refused_and_not_a_deadlock() -> None:
    loader = Loader()
    async with a_cache() as cache:

        @cache.cached(key="key")
        async def load() -> str:
            return await loader("key")

        plain = cache.cached(key="key")(lambda: "plain")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load)
            await loader.begun.wait()
            with pytest.raises(CacheError, match="is being loaded by a task of this thread"):
                plain()
            loader.go_on.set()
        assert plain() == "key 1"


@pytest.mark.parametrize("shape", ["coroutine", "plain"])
async def test_a_value_that_cannot_be_stored_is_returned_with_a_warning(
    shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_cache(max_bytes=1_000, weigher=len) as cache:
        big = "x" * 2_000
        calls = 0

        def count() -> str:
            nonlocal calls
            calls += 1
            return big

        @cache.cached(key="key")
        async def load() -> str:
            return count()

        plain = cache.cached(key="key")(count)
        with caplog.at_level(logging.WARNING, "cachebus"):
            for _ in range(2):
                assert (await load() if shape == "coroutine" else plain()) is big
        told = [record.getMessage() for record in caplog.records if record.name == "cachebus"]
        assert told == ["a loaded value was not stored: capacity"] * 2
        assert calls == 2
        assert await cache.exists("key") is False


async def test_a_closed_cache_does_not_load() -> None:
    calls = 0
    cache = a_cache()

    @cache.cached(key="key")
    async def load() -> None:
        nonlocal calls
        calls += 1

    with pytest.raises(CacheClosed, match="not open"):
        await load()
    async with cache:
        await load()
    with pytest.raises(CacheClosed, match="closed"):
        await load()
    assert calls == 1


def test_a_synchronous_cache_is_opened_by_the_first_call() -> None:
    cache = a_sync_cache()
    assert cache.cached(key="key")(lambda: 1)() == 1
    assert cache.get("key") == 1
    cache.close()
    with pytest.raises(CacheClosed, match="closed"):
        cache.cached(key="key")(lambda: 1)()
