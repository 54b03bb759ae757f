"""Who shares a load within a process, who waits for whom, and what becomes of it when they go."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from cachebus import Cache, CacheError, CacheTimeoutError, SyncCache, open_cache
from cachebus.adapters.chaos import ChaosStore
from cachebus.adapters.memory import MemoryStore
from cachebus.adapters.null import NullStore
from tests.clock import ManualClock
from tests.facade.faces import a_cache, a_sync_cache, settings


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    async with a_cache() as cache:
        yield cache


async def quiet(cache: Cache) -> None:
    await anyio.wait_all_tasks_blocked()
    assert cache._loads.flights == {}
    assert len(cache._loads.renewals) == 0


# Cancelling


@pytest.mark.parametrize("gone", [[0], [2], [0, 1, 2]], ids=["the first", "another", "all but one"])
async def test_cancelling_a_waiter_never_cancels_the_load_of_the_others(cache: Cache, gone: list[int]) -> None:
    begun, go_on = anyio.Event(), anyio.Event()
    calls = 0
    scopes = [anyio.CancelScope() for _ in range(4)]
    values: dict[int, Any] = {}

    async def load() -> str:
        nonlocal calls
        calls += 1
        begun.set()
        await go_on.wait()
        return "value"

    async def call(number: int) -> None:
        with scopes[number]:
            values[number] = await cache.get_or_load("k", load)

    async with anyio.create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(call, number)
        await begun.wait()
        await anyio.wait_all_tasks_blocked()
        for number in gone:
            scopes[number].cancel()
        await anyio.wait_all_tasks_blocked()
        go_on.set()
    assert values == dict.fromkeys(set(range(4)) - set(gone), "value")
    assert calls == 1
    await quiet(cache)


async def test_when_everybody_has_gone_the_load_is_cancelled_and_the_next_may_load_at_once(cache: Cache) -> None:
    begun, cancelled = anyio.Event(), anyio.Event()

    async def load() -> None:
        begun.set()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.set()

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(cache.get_or_load, "k", load)
        await begun.wait()
        tasks.cancel_scope.cancel()
    with anyio.fail_after(30):
        await cancelled.wait()
        assert await cache.get_or_load("k", lambda: "next") == "next"
    await quiet(cache)


async def test_who_stops_waiting_after_a_hard_timeout_lets_the_load_go_on(cache: Cache) -> None:
    begun, go_on = anyio.Event(), anyio.Event()

    async def load() -> str:
        begun.set()
        await go_on.wait()
        return "value"

    with pytest.raises(CacheTimeoutError):
        await cache.get_or_load("k", load, hard_timeout=0.01)
    go_on.set()
    with anyio.fail_after(30):
        while await cache.get("k") is None:
            await checkpoint()


async def test_a_first_caller_in_a_hurry_does_not_hurry_the_others(cache: Cache) -> None:
    begun, go_on = anyio.Event(), anyio.Event()
    values: list[Any] = []

    async def load() -> str:
        begun.set()
        await go_on.wait()
        return "value"

    async def hurried() -> None:
        with pytest.raises(CacheTimeoutError):
            await cache.get_or_load("k", load, hard_timeout=0.01)
        go_on.set()

    async def patient() -> None:
        await begun.wait()
        values.append(await cache.get_or_load("k", load))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(hurried)
        tasks.start_soon(patient)
    assert values == ["value"]


def test_a_loader_that_is_cancelled_from_inside_is_an_error_and_not_everybodys_next_load() -> None:
    async def main() -> int:
        calls = 0

        async def load() -> None:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0)  # So that the others come meanwhile.
            never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            never.cancel()
            await never

        async with a_cache() as cache:
            results = await asyncio.gather(*(cache.get_or_load("k", load) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(each, CacheError) and "was cancelled by something" in str(each) for each in results)
        return calls

    assert asyncio.run(main()) == 1


# Waiting in circles


async def test_a_loader_that_asks_for_its_own_key_is_told_so(cache: Cache) -> None:
    async def load() -> Any:
        return await cache.get_or_load("k", load)

    with anyio.fail_after(30), pytest.raises(CacheError, match="a loader asks for the very key that it is loading"):
        await cache.get_or_load("k", load)
    await quiet(cache)


async def test_two_loaders_that_need_each_others_keys_are_told_so(cache: Cache) -> None:
    a_begun, b_begun = anyio.Event(), anyio.Event()
    errors: list[str] = []

    async def load_a() -> Any:
        a_begun.set()
        await b_begun.wait()
        return await cache.get_or_load("b", load_b)

    async def load_b() -> Any:
        b_begun.set()
        await a_begun.wait()
        return await cache.get_or_load("a", load_a)

    async def call(key: str, load: Any) -> None:
        try:
            await cache.get_or_load(key, load)
        except CacheError as error:
            errors.append(str(error))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, "a", load_a)
            tasks.start_soon(call, "b", load_b)
    assert errors == ["a loader asks for a key whose loader waits for it: they would wait for ever"] * 2
    await quiet(cache)


async def test_loaders_that_share_what_they_need_are_no_circle(cache: Cache) -> None:
    async def part() -> int:
        await checkpoint()
        return 1

    async def load() -> int:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(cache.get_or_load, "part", part)
        return int(await cache.get_or_load("part", part)) + 1

    results: list[int] = []

    async def call(key: str) -> None:
        results.append(await cache.get_or_load(key, load))

    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for key in ("a", "b", "a", "b"):
                tasks.start_soon(call, key)
    assert results == [2] * 4


def test_a_circle_through_threads_is_found() -> None:
    with a_sync_cache() as cache:
        a_begun, b_begun = threading.Event(), threading.Event()

        def load_a() -> Any:
            a_begun.set()
            b_begun.wait(5)
            return cache.get_or_load("b", load_b)

        def load_b() -> Any:
            b_begun.set()
            a_begun.wait(5)
            return cache.get_or_load("a", load_a)

        with ThreadPoolExecutor(2) as pool:
            loads = [pool.submit(cache.get_or_load, "a", load_a), pool.submit(cache.get_or_load, "b", load_b)]
            errors = [str(each.exception(5)) for each in loads]
    assert errors == ["a loader asks for a key whose loader waits for it: they would wait for ever"] * 2


# Threads


@pytest.mark.parametrize("inline", [True, False], ids=["inline turns", "turns by the task"])
def test_threads_share_one_load(inline: bool) -> None:
    calls: list[int] = []
    barrier = threading.Barrier(32)

    def load(number: int) -> int:
        calls.append(number)
        return number

    with a_sync_cache(inline=inline) as cache:

        def call(_: int) -> list[Any]:
            out = []
            for number in range(30):
                barrier.wait()
                out.append(cache.get_or_load(f"k{number}", functools.partial(load, number)))
            return out

        with ThreadPoolExecutor(32) as pool:
            results = list(pool.map(call, range(32)))
    assert results == [list(range(30))] * 32
    assert sorted(calls) == list(range(30))


@pytest.fixture
def sync_cache() -> Any:
    with a_sync_cache(clock=ManualClock()) as cache:
        yield cache


def test_a_plain_loader_runs_in_the_calling_thread(sync_cache: SyncCache) -> None:
    assert sync_cache.get_or_load("k", threading.get_ident) == threading.get_ident()


def test_a_coroutine_function_runs_in_the_loop_of_the_cache(sync_cache: SyncCache) -> None:
    async def load() -> int:
        await checkpoint()
        return threading.get_ident()

    assert sync_cache.get_or_load("k", load) != threading.get_ident()

    async def load_itself() -> Any:
        return await asyncio.to_thread(sync_cache.get_or_load, "own", load_itself)

    with pytest.raises(CacheError, match="the very key that it is loading"):
        sync_cache.get_or_load("own", load_itself)


def test_a_thread_that_stops_waiting_lets_the_load_go_on(sync_cache: SyncCache) -> None:
    go_on = threading.Event()

    def load() -> str:
        go_on.wait(30)
        return "value"

    with pytest.raises(CacheTimeoutError):
        sync_cache.get_or_load("k", load, hard_timeout=0.01)
    with sync_cache.events("cache_set") as events:
        go_on.set()
        assert events.next(5) is not None
    assert sync_cache.get("k") == "value"


def test_a_stale_value_is_served_to_a_thread_at_once() -> None:
    clock = ManualClock()
    with a_sync_cache(clock=clock) as cache:
        cache.get_or_load("k", lambda: "old", ttl=1, stale_for=60)
        clock.advance(1)
        with cache.events("cache_set") as events:
            assert cache.get_or_load("k", lambda: "new", ttl=1, stale_for=60, soft_timeout=0) == "old"
            assert events.next(5) is not None
        assert cache.get("k") == "new"


def test_a_live_value_is_refreshed_beside_the_thread_that_reads_it() -> None:
    clock = ManualClock()
    with a_sync_cache(clock=clock) as cache:
        cache.get_or_load("k", lambda: "old", ttl=10, refresh=0.5)
        clock.advance(6)
        with cache.events("cache_set") as events:
            assert cache.get_or_load("k", lambda: "new", ttl=10, refresh=0.5) == "old"
            assert events.next(5) is not None
        assert cache.get("k") == "new"


# Stores that cannot lease, or cannot let anybody wait


async def test_a_store_without_leases_has_one_load_in_each_process() -> None:
    calls = 0
    begun, go_on = anyio.Event(), anyio.Event()
    values: list[Any] = []

    async def load() -> str:
        nonlocal calls
        calls += 1
        begun.set()
        await go_on.wait()
        return "value"

    async with open_cache(settings(), stores=lambda _: NullStore()) as cache:

        async def call() -> None:
            values.append(await cache.get_or_load("k", load))

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(call)
            await begun.wait()
            await anyio.wait_all_tasks_blocked()
            go_on.set()
        assert values == ["value"] * 10
        assert calls == 1
        assert await cache.get_or_load_many(["a", "b"], lambda keys: dict.fromkeys(keys, 1)) == {"a": 1, "b": 1}
        assert cache._loads._alone == {}


async def test_a_store_that_lets_nobody_wait_is_asked_again_and_again() -> None:
    # The chaos store answers for the memory store, and has no promises to give.
    store = ChaosStore(MemoryStore(), seed=1)
    begun, go_on = anyio.Event(), anyio.Event()
    values: list[Any] = []

    async def load() -> str:
        begun.set()
        await go_on.wait()
        return "value"

    async with open_cache(settings(), stores=lambda _: store) as cache:
        # Another process: a cache of its own at the same backend.
        other = Cache(lambda: cache._node).attach(cache.link)  # type: ignore[arg-type, return-value]

        async def call(of: Cache) -> None:
            values.append(await of.get_or_load("k", load))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, cache)
            await begun.wait()
            for _ in range(20):
                tasks.start_soon(call, other)
            before = store.counts.operations
            await anyio.sleep(0.1)
            asked = store.counts.operations - before
            go_on.set()
    assert values == ["value"] * 21
    assert 20 < asked < 45, "each reads once, two ask for all of them, and one goes on asking, ever more slowly"


async def test_two_caches_at_one_memory_backend_share_a_load_by_waiting(cache: Cache) -> None:
    other = Cache(lambda: cache._node).attach(cache.link)  # type: ignore[arg-type, return-value]
    begun, go_on = anyio.Event(), anyio.Event()
    calls = 0
    values: list[Any] = []

    async def load() -> str:
        nonlocal calls
        calls += 1
        begun.set()
        await go_on.wait()
        return "value"

    async def call(of: Cache) -> None:
        values.append(await of.get_or_load("k", load))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, cache)
        await begun.wait()
        for _ in range(20):
            tasks.start_soon(call, other)
        await anyio.wait_all_tasks_blocked()
        go_on.set()
    assert values == ["value"] * 21
    assert calls == 1
    await quiet(other)
    await quiet(cache)


async def test_the_error_of_a_loader_elsewhere_says_what_it_raised(cache: Cache) -> None:
    other = Cache(lambda: cache._node).attach(cache.link)  # type: ignore[arg-type, return-value]
    begun, go_on = anyio.Event(), anyio.Event()
    errors: list[str] = []

    async def load() -> None:
        begun.set()
        await go_on.wait()
        raise LookupError("with a secret in it")

    async def call(of: Cache) -> None:
        try:
            await of.get_or_load("k", load)
        except (LookupError, CacheError) as error:
            errors.append(str(error))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, cache)
        await begun.wait()
        tasks.start_soon(call, other)
        await anyio.wait_all_tasks_blocked()
        go_on.set()
    assert sorted(errors) == ["the loader of another process raised LookupError", "with a secret in it"]


async def test_when_whoever_loads_gives_up_one_of_those_who_wait_loads(cache: Cache) -> None:
    other = Cache(lambda: cache._node).attach(cache.link)  # type: ignore[arg-type, return-value]
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
