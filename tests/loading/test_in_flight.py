"""Loads that callers of one process share: waiting, cancellation and cycles of waiting loads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from cachebus import Cache, CacheError, CacheTimeoutError

from ..facade.faces import a_cache, a_sync_cache
from .quiet import quiet
from .slow import Slow


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    async with a_cache() as cache:
        yield cache


# Cancelling


@pytest.mark.parametrize("gone", [[0], [2], [0, 1, 2]], ids=["the first", "another", "all but one"])
async def test_cancelling_a_waiter_never_cancels_the_load_of_the_others(cache: Cache, gone: list[int]) -> None:
    load = Slow()
    scopes = [anyio.CancelScope() for _ in range(4)]
    values: dict[int, Any] = {}

    async def call(number: int) -> None:
        with scopes[number]:
            values[number] = await cache.get_or_load("k", load)

    async with anyio.create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(call, number)
        await load.begun.wait()
        await anyio.wait_all_tasks_blocked()
        for number in gone:
            scopes[number].cancel()
        await anyio.wait_all_tasks_blocked()
        load.go_on.set()
    assert values == dict.fromkeys(set(range(4)) - set(gone), "value")
    assert load.calls == 1
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
    load = Slow()

    with pytest.raises(CacheTimeoutError):
        await cache.get_or_load("k", load, hard_timeout=0.01)
    load.go_on.set()
    with anyio.fail_after(30):
        while await cache.get("k") is None:
            await checkpoint()


async def test_a_first_caller_in_a_hurry_does_not_hurry_the_others(cache: Cache) -> None:
    load = Slow()
    values: list[Any] = []

    async def hurried() -> None:
        with pytest.raises(CacheTimeoutError):
            await cache.get_or_load("k", load, hard_timeout=0.01)
        load.go_on.set()

    async def patient() -> None:
        await load.begun.wait()
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
            await asyncio.sleep(0)  # Lets the other callers join meanwhile.
            never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            never.cancel()
            await never

        async with a_cache() as cache:
            results = await asyncio.gather(*(cache.get_or_load("k", load) for _ in range(5)), return_exceptions=True)
        assert all(isinstance(each, CacheError) and "was cancelled by something" in str(each) for each in results)
        return calls

    assert asyncio.run(main()) == 1


# Cycles of waiting loads


async def test_a_loader_that_asks_for_its_own_key_is_told_so(cache: Cache) -> None:
    async def load() -> Any:
        return await cache.get_or_load("k", load)

    with anyio.fail_after(30), pytest.raises(CacheError, match="a loader requested the key that it is loading"):
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
    assert errors == ["a loader requested a key whose loader is waiting for it, which would be a deadlock"] * 2
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
    assert errors == ["a loader requested a key whose loader is waiting for it, which would be a deadlock"] * 2
