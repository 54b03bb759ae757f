"""Release of locks while their server is away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from uuid import uuid4

import anyio
import pytest

import cachebus.settings  # noqa: F401 (which blocks, as an import does, if a test is the first to open a cache)
from cachebus import CacheConnectionError, CacheError, CacheTimeoutError, CircuitOpen, open_cache
from cachebus.messages import LockReleased
from cachebus.testing.proxy import Proxy
from cachebus.testing.servers import Server, run_memcached, run_redis

pytestmark = pytest.mark.anyio

SERVERS = {"redis": run_redis, "memcached": run_memcached}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[tuple[Server, str]]:
    with SERVERS[request.param]() as running:
        yield running, f"{request.param}://{running.host}:{running.port}"


@pytest.fixture
def name() -> str:
    return uuid4().hex


async def test_many_are_given_back_soon(server: tuple[Server, str], name: str) -> None:
    running, url = server
    with Proxy.before(running) as proxy:
        async with (
            open_cache(url, namespace="fleet", timeout=5.0) as other,
            open_cache(proxy.url(url), namespace="fleet", timeout=5.0) as cache,
        ):
            locks = [await cache.lock(f"{name}{number}", ttl=600).acquire() for number in range(400)]
            proxy.switch("refuse")
            released = await asyncio.gather(*(each.release() for each in locks), return_exceptions=True)
            assert all(isinstance(each, CacheError) for each in released)
            proxy.switch("pass")
            with anyio.fail_after(30):
                for each in locks:
                    while await other.lock(each.name).is_locked():
                        await asyncio.sleep(0.05)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("how", ["leave", "cancelled"])
async def test_it_is_given_back_when_the_server_is_there_again(
    server: tuple[Server, str], name: str, waits: bool, how: str
) -> None:
    running, url = server
    with Proxy.before(running) as proxy:
        async with (
            open_cache(url, namespace="fleet", timeout=2.0) as other,
            open_cache(proxy.url(url), namespace="fleet", timeout=2.0) as cache,
        ):
            with cache.events(LockReleased) as released:
                lock = await cache.lock(name, ttl=600).acquire()
                after = other.lock(name, wait=30)
                waiting = asyncio.create_task(after.acquire()) if waits else None
                await asyncio.sleep(0.2)
                proxy.switch("refuse")
                if how == "leave":
                    with pytest.raises((CacheConnectionError, CircuitOpen, CacheTimeoutError)):
                        await lock.release()
                else:
                    with anyio.CancelScope() as scope:
                        scope.cancel()
                        await lock.release()
                await asyncio.sleep(1.5)  # The release is retried without success.
                assert await other.lock(name).is_locked()
                proxy.switch("pass")
                with anyio.fail_after(30):
                    event = await anext(aiter(released))
                    await (after.acquire() if waiting is None else waiting)
                assert isinstance(event, LockReleased)
                assert (event.key, event.token) == (name, lock.token)
                assert after.token > lock.token
                await after.release()
