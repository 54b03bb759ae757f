"""Large values over a slow connection: the adaptive timeout grows with the bytes, and no circuit opens."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager

import anyio
import pytest

from cachebus import open_cache
from cachebus.messages import CacheTimeoutError
from cachebus.testing.proxy import Proxy
from cachebus.testing.servers import Server, run_memcached, run_redis

SIZE = 900_000
pytestmark = pytest.mark.parametrize("run", [run_redis, run_memcached])


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_large_value_has_the_time_that_its_bytes_take(
    run: Callable[[], AbstractContextManager[Server]],
) -> None:
    value = os.urandom(SIZE)
    with run() as server, Proxy.before(server) as proxy:
        url = f"{proxy.url(server.url)}?timeout_min=1&timeout_initial=1"
        async with open_cache(url, namespace="slow", timeout=30.0, on_error="raise") as cache:
            assert await cache.set("large", value)
            await anyio.to_thread.run_sync(lambda: proxy.switch("slow", seconds=2.5))
            # Longer than the timeout, but bytes arrive every 20 ms.
            started = anyio.current_time()
            assert await cache.get("large") == value
            assert anyio.current_time() - started > 2.0
            guard = (await cache.statistics()).guard
            assert (guard["state"], guard["failure_count"]) == ("closed", 0)


async def test_a_large_value_has_no_more_time_than_its_caller(
    run: Callable[[], AbstractContextManager[Server]],
) -> None:
    with run() as server, Proxy.before(server) as proxy:
        url = f"{proxy.url(server.url)}?timeout_min=1&timeout_initial=1"
        async with open_cache(url, namespace="slow", timeout=2.0, on_error="raise") as cache:
            assert await cache.set("large", os.urandom(SIZE))
            await anyio.to_thread.run_sync(lambda: proxy.switch("slow", seconds=30.0))
            started = anyio.current_time()
            with pytest.raises(CacheTimeoutError):
                await cache.get("large")
            assert 1.9 < anyio.current_time() - started < 10.0
            assert (await cache.statistics()).guard["state"] == "closed"
