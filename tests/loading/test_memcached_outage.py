"""A real Memcached dies during loads: no invalidated value is returned, and every caller gets a reply."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
from anyio import to_thread

from cachebus import Cache, CacheError, open_cache
from cachebus.messages import LoadLeaseLost
from cachebus.settings import Settings, load_settings
from cachebus.testing.servers import Server, run_memcached


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server() -> Iterator[Server]:
    with run_memcached() as running:
        yield running


def settings_of(server: Server) -> Settings:
    return load_settings(f"{server.url}?timeout=0.3&connect_timeout=0.3&breaker_recovery=0.1", namespace="shop")


async def back(cache: Cache) -> None:
    """Wait until the cache reaches its server again."""
    limit = time.monotonic() + 30
    await cache.set("sign", 1)
    while await cache.get("sign") is None:
        assert time.monotonic() < limit
        await anyio.sleep(0.01)
        await cache.set("sign", 1)


async def test_what_was_loaded_before_a_restart_is_not_stored_after_it(server: Server) -> None:
    source, begun, go_on = 1, anyio.Event(), anyio.Event()

    async def load() -> int:
        value = source
        begun.set()
        await go_on.wait()
        return value

    async with open_cache(settings_of(server)) as cache, open_cache(settings_of(server)) as other:
        with cache.events(LoadLeaseLost) as lost:
            got: list[int] = []

            async def ask() -> None:
                got.append(await cache.get_or_load("k", load, ttl=60, tags=["t"]))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask)
                await begun.wait()
                await to_thread.run_sync(server.restart)
                await back(cache)
                await back(other)
                source = 2
                await other.invalidate_tags("t")
                go_on.set()
            assert got == [1], "who asked before has what was loaded for it"
            with anyio.fail_after(30):
                event: Any = await anext(aiter(lost))
            assert event.key == "k"
        assert await other.get("k") is None
        assert await other.get_or_load("k", load, ttl=60, tags=["t"]) == 2


async def test_nobody_hangs_while_the_server_dies_and_comes_back_under_loads(server: Server) -> None:
    truth, floor = 1, 1
    stale: list[str] = []
    reads = failures = 0
    done = False

    async def load() -> int:
        await anyio.sleep(0.005)
        value = truth
        await anyio.sleep(0.005)
        return value

    async def read(cache: Cache) -> None:
        nonlocal reads, failures
        while not done:
            least = floor
            try:
                with anyio.fail_after(30):
                    value = await cache.get_or_load("k", load, ttl=60, tags=["t"], lease_ttl=0.5, wait_limit=2.0)
            except CacheError:
                failures += 1
                continue
            reads += 1
            if value < least:
                stale.append(f"{value} was read, but {least} had been made known")
            await anyio.sleep(0.001)

    async def write(cache: Cache) -> None:
        nonlocal truth, floor
        while not done:
            await anyio.sleep(0.02)
            truth += 1
            try:
                await (cache.invalidate_tags("t") if truth % 2 else cache.delete("k"))
            except CacheError:
                continue
            floor = max(floor, truth)

    async with AsyncExitStack() as stack:
        caches = [await stack.enter_async_context(open_cache(settings_of(server))) for _ in range(2)]
        async with anyio.create_task_group() as tasks:
            for cache in caches:
                for _ in range(5):
                    tasks.start_soon(read, cache)
            tasks.start_soon(write, caches[0])
            for number in range(5):
                if number:
                    await to_thread.run_sync(server.restart)
                enough = (reads + 25, floor + 3)
                with anyio.fail_after(30):
                    while reads < enough[0] or floor < enough[1]:
                        await anyio.sleep(0.01)
            done = True
        assert stale == []
        for cache in caches:
            await back(cache)
        before = truth
        await caches[0].invalidate_tags("t")
        assert await caches[1].get_or_load("k", load, ttl=60, tags=["t"]) == before
