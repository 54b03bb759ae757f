"""A cache over a real Redis that goes away and comes back: the application stays fast and recovers by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import anyio
import pytest
from anyio import to_thread

from cachebus import (
    Cache,
    CacheConnectionError,
    CacheInvalidationError,
    CacheTimeoutError,
    open_cache,
    open_sync_cache,
)
from cachebus.messages import BackendConnected, BackendDisconnected, CircuitClosed, CircuitOpened, Event
from cachebus.settings import load_settings
from cachebus.testing.processes import free_port
from cachebus.testing.proxy import Mode, Proxy
from cachebus.testing.servers import Server, run_redis

from ..lateness import within

RECOVERY = 0.5
BACK_WITHIN = within(2.0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with run_redis() as server:
        yield server


@asynccontextmanager
async def cache_at(url: str, **options: Any) -> AsyncIterator[Cache]:
    settings = load_settings(f"{url}?breaker_recovery={RECOVERY}", namespace=uuid4().hex, **options)
    async with open_cache(settings) as cache:
        yield cache


async def until_it_works(cache: Cache) -> float:
    """Return the seconds until a value can be stored and read again, with repeated attempts as in an application."""
    began = time.monotonic()
    while not (await cache.set("probe", 1) and await cache.get("probe") == 1):
        await anyio.sleep(0.01)
    return time.monotonic() - began


async def until_the_circuit_is_open(cache: Cache) -> None:
    with cache.events(CircuitOpened) as events:
        while not len(events):
            await cache.get("probe")


async def slow_calls(cache: Cache, seconds: float) -> tuple[int, int]:
    """Call for the given time. Return the number of calls, and of those that took over 20 ms."""
    calls = slow = 0
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        assert await cache.get("k", "default") == "default"
        calls += 1
        slow += time.monotonic() - began > 0.02
        await anyio.sleep(0.001)
    return calls, slow


async def test_behind_an_open_circuit_a_half_open_server_costs_no_time_and_is_found_again(server: Server) -> None:
    with Proxy.before(server) as proxy:
        async with cache_at(proxy.url(server.url)) as cache:
            assert await cache.set("there", 1)
            await to_thread.run_sync(lambda: proxy.switch("half_open"))
            await until_the_circuit_is_open(cache)
            # No probe is admitted within half of the recovery time.
            calls, slow = await slow_calls(cache, RECOVERY / 2)
            assert calls > 20
            assert slow <= calls * 0.1, "only delays of the machine are allowed, not timeouts"
            assert (await cache.statistics()).guard["state"] == "open"
            await to_thread.run_sync(lambda: proxy.switch("pass"))
            assert await until_it_works(cache) < BACK_WITHIN
            assert await cache.get("there") == 1


async def test_a_server_that_is_killed_and_started_again_is_told_of_and_found_again() -> None:
    kinds: tuple[type[Event], ...] = (BackendConnected, BackendDisconnected, CircuitOpened, CircuitClosed)
    with run_redis() as server:
        async with cache_at(server.url) as cache:
            loads = 0

            @cache.cached(key="k:{n}")
            async def load(n: int) -> int:
                nonlocal loads
                loads += 1
                return n

            await load(0)
            with cache.events(*kinds) as events:
                await to_thread.run_sync(server.kill)
                await until_the_circuit_is_open(cache)
                began = time.monotonic()
                assert [await load(number) for number in range(200)] == list(range(200))
                assert time.monotonic() - began < within(1.0), "calls must be as fast as the loader"
                assert loads == 201
                health = await cache.health()
                assert not health.ok
                assert health.circuit in ("open", "half_open")
                assert (await cache.statistics()).errors >= 200, (
                    "each failed read must count once, without an attempt to store"
                )
                await to_thread.run_sync(server.start)
                assert await until_it_works(cache) < BACK_WITHIN
                while (await cache.statistics()).guard["state"] != "closed":
                    await cache.get("probe")
                told: list[type[Event]] = []
                while len(events):
                    event = events.next(0)
                    assert event is not None
                    told.append(type(event))
            assert told[:2] in ([BackendDisconnected, CircuitOpened], [CircuitOpened, BackendDisconnected])
            assert BackendConnected in told
            assert told[-1] is CircuitClosed
            assert (await cache.health()).circuit == "closed"


async def test_a_cache_is_opened_before_its_server_and_finds_it_by_itself() -> None:
    port = free_port()
    url = f"redis://127.0.0.1:{port}"
    async with cache_at(url) as cache:
        assert await cache.get("k", "default") == "default"
        assert not (await cache.health()).ok
        with run_redis(port=port):
            assert await until_it_works(cache) < BACK_WITHIN
    with pytest.raises(CacheConnectionError):
        async with cache_at(url, on_error="raise"):
            raise AssertionError("it opened")


EVERY_CALL: dict[str, Callable[[Cache], Awaitable[Any]]] = {
    "get": lambda cache: cache.get("k"),
    "lookup": lambda cache: cache.lookup("k"),
    "get_many": lambda cache: cache.get_many(["k", "l"]),
    "exists": lambda cache: cache.exists("k"),
    "ttl": lambda cache: cache.ttl("k"),
    "set": lambda cache: cache.set("k", 1),
    "set_many": lambda cache: cache.set_many({"k": 1}),
    "add": lambda cache: cache.add("k", 1),
    "compare_and_set": lambda cache: cache.compare_and_set("k", 1, version=1.0),
    "touch": lambda cache: cache.touch("k"),
    "increment": lambda cache: cache.increment("n"),
    "delete": lambda cache: cache.delete("k"),
    "delete_many": lambda cache: cache.delete_many(["k"]),
    "delete_pattern": lambda cache: cache.delete_pattern("*"),
    "clear": lambda cache: cache.clear(),
    "health": lambda cache: cache.health(),
}


@pytest.mark.parametrize("mode", ["refuse", "reset", "half_open", "lose_reply", "garbage"])
async def test_whatever_breaks_every_call_ends_by_its_deadline(server: Server, mode: Mode) -> None:
    timeout = 0.4
    took: dict[str, float] = {}
    with Proxy.before(server) as proxy:
        options = f"{proxy.url(server.url)}?breaker=off&connect_timeout=0.2&retry_budget=1"
        async with open_cache(options, namespace=uuid4().hex, timeout=timeout) as cache:
            await cache.set("k", 1)
            await to_thread.run_sync(lambda: proxy.switch(mode))

            async def call(name: str) -> None:
                began = time.monotonic()
                with suppress(CacheConnectionError, CacheTimeoutError, CacheInvalidationError):
                    await EVERY_CALL[name](cache)
                took[name] = time.monotonic() - began

            async with anyio.create_task_group() as tasks:
                for name in EVERY_CALL:
                    tasks.start_soon(call, name)
            await to_thread.run_sync(lambda: proxy.switch("pass"))
            assert await until_it_works(cache) < BACK_WITHIN
    assert {name: seconds for name, seconds in took.items() if seconds > within(timeout)} == {}
    assert len(took) == len(EVERY_CALL)


async def test_a_lost_reply_never_makes_one_increment_two(server: Server) -> None:
    in_doubt = 0
    with Proxy.before(server) as proxy:
        options = f"{proxy.url(server.url)}?breaker=off&retry_attempts=5&retry_budget=1"
        async with open_cache(options, namespace=uuid4().hex, on_error="raise") as cache:
            for number in range(30):
                before = await cache.increment("n", 0)
                await to_thread.run_sync(lambda: proxy.switch("lose_reply"))
                with pytest.raises((CacheConnectionError, CacheTimeoutError)) as caught:
                    await cache.increment("n")
                await to_thread.run_sync(lambda: proxy.switch("pass"))
                after = await cache.get("n")
                assert after - before in (0, 1), number
                if after != before:
                    assert str(caught.value).endswith("whether the request was done is not known")
                    in_doubt += 1
    assert in_doubt > 0, "some requests must have been carried out with a lost reply"


def test_what_is_lost_with_its_connection_is_answered_at_once_on_a_loop_that_anyio_did_not_start(
    server: Server,
) -> None:
    async def main(proxy: Proxy) -> None:
        async with cache_at(proxy.url(server.url), timeout=30.0) as cache:
            await cache.set("k", 1)
            await asyncio.to_thread(proxy.switch, "half_open")
            asking = asyncio.create_task(cache.get("k", "default"))
            while not (await cache.statistics()).guard["in_flight"]:
                await asyncio.sleep(0)
            await asyncio.to_thread(proxy.switch, "refuse")
            began = time.monotonic()
            assert await asking == "default"
            assert time.monotonic() - began < 15.0, "the answer must not take the 30 s of the timeout"
            assert (await cache.statistics()).guard["retries"] > 0

    with Proxy.before(server) as proxy:
        asyncio.run(main(proxy))


def test_a_synchronous_cache_says_at_its_first_use_that_its_server_is_down_and_may_be_used_later() -> None:
    port = free_port()
    cache = open_sync_cache(f"redis://127.0.0.1:{port}", on_error="raise")
    with pytest.raises(CacheConnectionError):
        cache.get("k")
    with run_redis(port=port), cache:
        assert cache.get("k", "default") == "default"


def test_a_synchronous_cache_goes_on_without_its_server_too() -> None:
    with run_redis() as server, open_sync_cache(f"{server.url}?breaker_recovery={RECOVERY}") as cache:
        assert cache.set("k", 1)
        server.kill()
        assert [cache.get("k", "default") for _ in range(50)] == ["default"] * 50
        assert cache.health().circuit == "open"
        server.start()
        began = time.monotonic()
        while not cache.set("k", 2):
            time.sleep(0.01)
        assert time.monotonic() - began < BACK_WITHIN
        assert cache.get("k") == 2


async def test_a_program_that_begins_during_an_outage_is_served_at_once(tmp_path: Path) -> None:
    """Open a cache with a host that drops all packets, so that connections are not even refused."""
    file = tmp_path / "cachebus.yaml"
    with run_redis() as server, Proxy.before(server, "half_open") as proxy:
        file.write_text(f"backends:\n- type: redis\n  hosts: ['{proxy.host}:{proxy.port}']\n  connect_timeout: 0.2\n")
        settings = await to_thread.run_sync(lambda: open_cache(str(file)))
        began = time.monotonic()
        async with settings as cache:
            assert time.monotonic() - began < within(0.2), "opening must not exceed the connect timeout"
            assert await cache.get("k", "default") == "default"
