"""Loading over NATS: clients of a worker share one load, and waiters are parked at the worker."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest

from cachebus import Cache, CacheTimeoutError, LoadResult, Node, Settings, open_cache
from cachebus.bus import Address
from cachebus.messages import GetOrLease, TakeSnapshot
from cachebus.testing.servers import Server

from .conftest import StartWorker

pytestmark = pytest.mark.anyio
BACKEND = Address("backend.primary")
VALUE = {"pair": (1, 2), "raw": b"\x01"}


@pytest.fixture(params=["here", "process", "redis"])
async def caches(
    request: pytest.FixtureRequest, nats_server: Server, namespace: str, start_worker: StartWorker
) -> AsyncIterator[tuple[Cache, Cache]]:
    """Open two clients of one worker: in this process, in another one, or with Redis as its store."""
    url = nats_server.url
    async with AsyncExitStack() as stack:
        if request.param == "process":
            await start_worker("memory", BACKEND, "sole")
        else:
            backend = "memory://"
            if request.param == "redis":
                backend = request.getfixturevalue("redis_server").url
            settings: Any = Settings(namespace=namespace, bus=url, backends=[backend])  # type: ignore[arg-type]
            await stack.enter_async_context(Node(settings, serve=True))
        yield (
            await stack.enter_async_context(open_cache("bus:primary", bus=url, namespace=namespace, on_error="raise")),
            await stack.enter_async_context(open_cache("bus:primary", bus=url, namespace=namespace, on_error="raise")),
        )


async def never() -> Any:
    raise AssertionError("no caller should load")


class Slow:
    """Loader that waits for `go_on`."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.begun = anyio.Event()
        self.go_on = anyio.Event()

    async def __call__(self) -> Any:
        self.begun.set()
        await self.go_on.wait()
        return self.value


async def wait_for(cache: Cache, values: list[Any], load: Any) -> None:
    values.append(await cache.get_or_load("k", load, ttl=60))


async def test_those_who_wait_at_another_client_get_the_value(caches: tuple[Cache, Cache]) -> None:
    one, other = caches
    slow, values = Slow(VALUE), []  # type: tuple[Slow, list[Any]]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_for, one, values, slow)
        await slow.begun.wait()
        for _ in range(20):
            tasks.start_soon(wait_for, other, values, never)
        await other.get("something else")
        slow.go_on.set()
    assert values == [VALUE] * 21
    assert await other.get("k") == VALUE


async def test_what_is_invalidated_during_its_load_is_not_stored(caches: tuple[Cache, Cache]) -> None:
    one, other = caches
    slow, values = Slow("old"), []  # type: tuple[Slow, list[Any]]

    async def new() -> str:
        return "new"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait_for, one, values, slow)
        await slow.begun.wait()
        await other.delete("k")
        assert await other.get_or_load("k", new) == "new"
        slow.go_on.set()
    assert values == ["old"], "only callers from before the delete get the old value"
    assert await one.get("k") == "new"


async def test_a_stale_value_comes_over_the_bus(caches: tuple[Cache, Cache]) -> None:
    one, other = caches

    async def first() -> LoadResult:
        return LoadResult(VALUE, ttl=0.02, etag="v1")

    async def broken() -> Any:
        raise OSError("away")

    assert await one.get_or_load("k", first, stale_for=60) == VALUE
    with anyio.fail_after(30):
        while await other.exists("k"):
            await anyio.sleep(0.002)
    assert await other.get_or_load("k", broken, stale_for=60) == VALUE
    assert await one.get_or_load_many(["k", "j"], lambda keys: dict.fromkeys(keys, 1)) == {"k": 1, "j": 1}
    assert await other.get_many(["k", "j"]) == {"k": 1, "j": 1}


async def test_a_load_that_takes_longer_than_a_call_may_is_waited_for(nats_server: Server, namespace: str) -> None:
    url, timeout = nats_server.url, 0.3
    async with (
        Node(Settings(namespace=namespace, bus=url), serve=True),  # type: ignore[arg-type]
        open_cache("bus:primary", bus=url, namespace=namespace, timeout=timeout) as one,
        open_cache("bus:primary", bus=url, namespace=namespace, timeout=timeout) as other,
    ):
        slow, values = Slow(VALUE), []  # type: tuple[Slow, list[Any]]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait_for, one, values, slow)
            await slow.begun.wait()
            tasks.start_soon(wait_for, other, values, never)
            parked = GetOrLease("k", "somebody", "token", 9.0, wait=9.0)
            with pytest.raises(CacheTimeoutError):  # The load takes longer than two calls are allowed to.
                await one.client.bus.request(BACKEND, parked, 2 * timeout)
            slow.go_on.set()
        assert values == [VALUE] * 2
        assert (await one.client.request(TakeSnapshot())).sets == 1


async def test_a_worker_whose_store_cannot_lease_says_so(nats_server: Server, namespace: str) -> None:
    url = nats_server.url
    async with (
        Node(Settings(namespace=namespace, bus=url, backends=["null://"]), serve=True),  # type: ignore[arg-type]
        open_cache("bus:primary", bus=url, namespace=namespace, on_error="raise") as cache,
    ):
        calls = 0

        async def load() -> int:
            nonlocal calls
            calls += 1
            return calls

        assert [await cache.get_or_load("k", load) for _ in range(2)] == [1, 2]
