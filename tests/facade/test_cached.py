"""The decorator: one load per key, for coroutine and plain functions, on both facades."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from cachebus import (
    Found,
    SyncCache,
)
from cachebus.messages import CacheSet, LoadFailed, LoadStarted, LoadSucceeded, Set

from ..clock import ManualClock
from .faces import a_cache, a_sync_cache, heard
from .loaders import Loader


@pytest.mark.parametrize("inline", [True, False], ids=["inline turns", "turns by the task"])
async def test_100_tasks_that_miss_at_once_share_one_load(inline: bool) -> None:
    loader = Loader()
    async with a_cache(inline=inline) as cache:

        @cache.cached(key="k:{key}")
        async def load(key: str) -> str:
            return await loader(key)

        values: list[str] = []

        async def call() -> None:
            values.append(await load("a"))

        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            loader.go_on.set()
        assert values == ["a 1"] * 100
        assert loader.calls == 1
        assert await load("a") == "a 1"
        assert await cache.get("k:a") == "a 1"
        assert await load("b") == "b 2"


@pytest.mark.parametrize("inline", [True, False], ids=["inline turns", "turns by the task"])
def test_32_threads_that_miss_at_once_share_one_load(inline: bool) -> None:
    calls: list[str] = []
    waiting = threading.Barrier(32)
    with a_sync_cache(inline=inline) as cache:

        @cache.cached(key="k:{key}")
        def load(key: str) -> str:
            calls.append(key)
            return key * 2

        def call(_: int) -> list[str]:
            out = []
            for round_ in range(50):
                waiting.wait()
                out.append(load(f"{round_}"))
            return out

        with ThreadPoolExecutor(32) as pool:
            results = list(pool.map(call, range(32)))
    assert results == [[f"{round_}" * 2 for round_ in range(50)]] * 32
    assert sorted(calls, key=int) == [f"{round_}" for round_ in range(50)]


@pytest.mark.parametrize("leader", ["a task", "a thread"])
def test_tasks_and_threads_share_one_load(leader: str) -> None:
    calls: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    async def main() -> None:
        async with a_cache() as cache:

            @cache.cached(key="{key}")
            async def load(key: str) -> str:
                calls.append("a task")
                begun.set()
                await asyncio.to_thread(go_on.wait)
                return f"{key} from {calls[0]}"

            @cache.cached(key="{key}")
            def load_plain(key: str) -> str:
                calls.append("a thread")
                begun.set()
                go_on.wait()
                return f"{key} from {calls[0]}"

            def in_another_loop() -> str:
                return anyio.run(load, "x", backend="trio")

            with ThreadPoolExecutor(20) as pool:
                loop = asyncio.get_running_loop()
                if leader == "a task":
                    first: asyncio.Future[str] = asyncio.ensure_future(load("x"))
                else:
                    first = loop.run_in_executor(pool, load_plain, "x")
                await loop.run_in_executor(pool, begun.wait)
                others: list[asyncio.Future[str]] = [asyncio.ensure_future(load("x")) for _ in range(20)]
                others += [loop.run_in_executor(pool, load_plain, "x") for _ in range(8)]
                others += [loop.run_in_executor(pool, in_another_loop) for _ in range(4)]
                # Callers may already wait or come after the load. Either way there is one load.
                await asyncio.sleep(0)
                go_on.set()
                values = await asyncio.gather(first, *others)
            assert set(values) == {f"x from {leader}"}

    asyncio.run(main())
    assert calls == [leader]


async def test_keys_do_not_wait_for_each_other() -> None:
    slow = Loader()
    async with a_cache() as cache:

        @cache.cached(key="slow:{key}")
        async def load_slow(key: str) -> str:
            return await slow(key)

        @cache.cached(key="fast:{key}")
        async def load_fast(key: str) -> str:
            return key

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load_slow, "a")
            await slow.begun.wait()
            assert await load_fast("b") == "b"
            await cache.set("c", 1)
            assert await cache.get("c") == 1
            assert await cache.get("slow:a") is None
            assert (await cache.health()).ok, "a load must not occupy a turn of the backend"
            slow.go_on.set()


def test_a_plain_load_is_not_a_turn_of_the_backends(sync_cache: SyncCache) -> None:
    @sync_cache.cached(key="outer")
    def load() -> Any:
        sync_cache.set("inner", 1)
        return [sync_cache.get("inner"), sync_cache.health().ok, inner()]

    @sync_cache.cached(key="another")
    def inner() -> int:
        return 2

    assert load() == [1, True, 2]


async def test_a_load_that_comes_in_after_the_miss_is_not_done_again() -> None:
    # The value arrives after a caller's miss and before it becomes the leader, so the caller reads again.
    async with a_cache() as cache:
        calls = 0

        @cache.cached(key="key")
        async def load() -> int:
            nonlocal calls
            calls += 1
            return calls

        client = cache.client
        try_inline_get = client.try_inline_get

        def miss_then_store(request: Any) -> Any:
            reply = try_inline_get(request)
            client.try_inline_get = try_inline_get
            client.try_inline_set(Set("key", "meanwhile"))
            return reply

        client.try_inline_get = miss_then_store
        assert await load() == "meanwhile"  # type: ignore[comparison-overlap]
        assert calls == 0
        statistics = await cache.statistics()
        assert (statistics.hits, statistics.misses) == (0, 1), "a lease request counts as neither"


# Arguments and results


@pytest.mark.parametrize("value", [None, 0, "", [], False])
async def test_whatever_is_returned_is_cached(value: Any) -> None:
    calls = 0
    async with a_cache() as cache:

        @cache.cached(key="key")
        async def load() -> Any:
            nonlocal calls
            calls += 1
            return value

        assert await load() is value
        assert await load() is value
        assert calls == 1


async def test_an_asynchronous_cache_decorates_a_plain_function() -> None:
    calls = 0
    async with a_cache() as cache:

        @cache.cached(key="{number}")
        def double(number: int) -> int:
            nonlocal calls
            calls += 1
            return number * 2

        assert (double(4), double(4), await cache.get("4")) == (8, 8, 8)
        assert calls == 1


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("inline", [True, False], ids=["inline turns", "turns by the task"])
def test_a_synchronous_cache_decorates_a_coroutine_function(backend: str, inline: bool) -> None:
    calls = 0
    with a_sync_cache(inline=inline) as cache:
        cache.get("opened")

        @cache.cached(key="{number}")
        async def double(number: int) -> int:
            nonlocal calls
            calls += 1
            await checkpoint()
            return number * 2

        async def main() -> list[int]:
            return [await double(4), await double(4)]

        assert anyio.run(main, backend=backend) == [8, 8]
        assert cache.get("4") == 8
        assert calls == 1


def test_a_tag_template_that_gives_an_empty_tag_is_an_error(sync_cache: SyncCache) -> None:
    load = sync_cache.cached(key="k", tags=["{tag}"])(lambda tag: tag)
    with pytest.raises(ValueError, match="a tag must not be empty"):
        load("")
    assert sync_cache.exists("k") is False


async def test_the_time_to_live_and_the_tags_go_with_the_value(clock: ManualClock) -> None:
    calls = 0
    async with a_cache(clock=clock) as cache:

        @cache.cached(key="user:{user}", ttl=60, tags=["users", "team:{team}", "team:{user}"])
        async def load(user: int, team: int) -> int:
            nonlocal calls
            calls += 1
            return calls

        assert await load(1, team=1) == 1
        found = await cache.lookup("user:1")
        assert isinstance(found, Found)
        assert (found.ttl, found.tags) == (60.0, ("users", "team:1"))
        await cache.invalidate_tags("team:2")
        assert await load(1, team=1) == 1
        await cache.invalidate_tags("team:1")
        assert await load(1, team=1) == 2
        clock.advance(60)
        assert await load(1, team=1) == 3


def test_the_default_time_to_live_is_the_backends(clock: ManualClock) -> None:
    with a_sync_cache(clock=clock, default_ttl=7.0) as cache:
        cache.cached(key="key")(lambda: 1)()
        assert cache.ttl("key") == 7.0
        cache.cached(key="none", ttl=None)(lambda: 1)()
        assert cache.ttl("none") is None


async def test_a_load_is_told_in_events() -> None:
    async with a_cache() as cache:
        with cache.events(LoadStarted, LoadSucceeded, LoadFailed, CacheSet) as events:

            @cache.cached(key="{key}")
            async def load(key: str) -> str:
                if key == "bad":
                    raise LookupError(key)
                return key

            await load("good")
            await load("good")
            with pytest.raises(LookupError):
                await load("bad")
            said: list[Any] = [*heard(events)]
        assert [(type(event), event.key) for event in said] == [
            (LoadStarted, "good"),
            (LoadSucceeded, "good"),
            (CacheSet, "good"),
            (LoadStarted, "bad"),
            (LoadFailed, "bad"),
        ]
        assert said[-1].error == "LookupError"
        assert {event.backend for event in said} == {"primary"}


def test_a_load_is_timed_by_the_clock_of_the_node(sync_cache: SyncCache, clock: ManualClock) -> None:
    @sync_cache.cached(key="{key}")
    def load(key: str) -> str:
        clock.advance(2.5)
        if key == "bad":
            raise LookupError(key)
        return key

    with sync_cache.events(LoadSucceeded, LoadFailed) as events:
        load("good")
        with pytest.raises(LookupError):
            load("bad")
        said: list[Any] = [*heard(events)]
        assert [event.duration for event in said] == [2.5, 2.5]
