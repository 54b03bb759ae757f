"""Loading with encoded values: callers never see payloads, and undecodable payloads are loaded again."""

from __future__ import annotations

import datetime as dt
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import uuid4

import anyio
import pytest

from cachebus import Cache, LoadContext, LoadResult, open_cache, open_sync_cache
from cachebus.messages import PayloadRejected, StaleServed
from cachebus.settings import load_settings
from cachebus.testing.servers import run_redis

from ..facade.faces import heard
from .slow import Slow

SEALED = {"encryption_keys": {"k1": bytes(range(32))}, "tenant": "shop"}
PAYLOADS: dict[str, dict[str, Any]] = {
    "json": {"serializer": "json"},
    "sealed": SEALED,
    "in a thread": {"serializer": "msgpack", "offload_above": 1},
}
VALUE = {"at": dt.date(2024, 1, 1), "pair": (1, 2), "raw": b"\x01\x02"}
NEWER = {"at": dt.date(2025, 1, 1), "pair": (3, 4), "raw": b""}
OLD_FORMAT = {"serializer": "pickle", "signing_keys": [bytes(range(32, 64))]}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with run_redis() as server:
        yield server.url


class Place:
    """Backend that caches with different payload settings share. Memory caches share the backend of one node."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.namespace = f"t{uuid4().hex}"

    def settings(self, payload: dict[str, Any]) -> Any:
        return load_settings(self.url, namespace=self.namespace, payload=payload, on_error="raise")


@pytest.fixture(params=["memory", "redis"])
def place(request: pytest.FixtureRequest) -> Place:
    return Place("memory://" if request.param == "memory" else request.getfixturevalue("redis_url"))


@pytest.fixture(params=PAYLOADS)
async def caches(request: pytest.FixtureRequest, place: Place) -> AsyncIterator[tuple[Cache, Cache]]:
    """Two independent caches over one backend, as in two processes."""
    async with open_cache(place.settings(PAYLOADS[request.param])) as one:
        yield one, Cache(lambda: one._node).attach(one.client)  # type: ignore[arg-type, return-value]


async def over(cache: Cache, key: str) -> None:
    """Wait until a value has expired."""
    with anyio.fail_after(30):
        while await cache.exists(key):
            await anyio.sleep(0.002)
        # The estimate of the server's clock is never behind, and is ahead by at most the round-trip time.
        await anyio.sleep(0.05)


def loader_of(value: Any) -> Any:
    async def load() -> Any:
        return value

    return load


async def never() -> Any:
    raise AssertionError("no caller should load")


async def broken() -> Any:
    raise OSError("the source is away")


async def test_what_is_loaded_is_read_again(caches: tuple[Cache, Cache]) -> None:
    one, other = caches
    assert await one.get_or_load("k", loader_of(VALUE), ttl=60, stale_for=60) == VALUE
    assert await one.get_or_load("k", never) == VALUE
    assert await other.get_or_load("k", never) == VALUE
    assert await other.get("k") == VALUE
    assert await other.get_many(["k"]) == {"k": VALUE}
    assert await one.get_or_load("n", loader_of(41)) == 41
    assert await other.get_or_load("n", never) == 41


async def test_what_is_served_stale_is_the_value(caches: tuple[Cache, Cache]) -> None:
    one, other = caches
    await one.get_or_load("k", loader_of(VALUE), ttl=0.02, stale_for=60)
    await over(one, "k")
    with one.events(StaleServed) as events:
        assert await one.get_or_load("k", broken, stale_for=60) == VALUE
        assert await other.get_or_load("k", broken, stale_for=60) == VALUE
        assert await other.get_or_load_many(["k"], lambda keys: 1 / 0, stale_for=60) == {"k": VALUE}
        assert len(heard(events)) == 3
    contexts: list[LoadContext] = []

    async def look(context: LoadContext) -> LoadResult:
        contexts.append(context)
        return LoadResult.not_modified(ttl=60)

    assert await one.get_or_load("k", look) == VALUE
    assert [each.stale for each in contexts] == [VALUE]
    assert await other.get("k") == VALUE


async def test_a_soft_timeout_serves_the_value_also_while_another_process_loads(caches: tuple[Cache, Cache]) -> None:
    one, other = caches
    await one.get_or_load("k", loader_of(VALUE), ttl=0.02, stale_for=60)
    await over(one, "k")
    go_on = anyio.Event()

    async def slow() -> Any:
        await go_on.wait()
        return NEWER

    assert await one.get_or_load("k", slow, soft_timeout=0, ttl=60, stale_for=60) == VALUE
    assert await other.get_or_load("k", never, soft_timeout=0, stale_for=60) == VALUE
    go_on.set()
    assert await other.get_or_load("k", never) == NEWER
    assert await one.get("k") == NEWER


async def test_those_who_wait_elsewhere_get_the_value(caches: tuple[Cache, Cache]) -> None:
    one, other = caches
    slow = Slow(VALUE)
    values: list[Any] = []

    async def ask(cache: Cache, load: Any) -> None:
        values.append(await cache.get_or_load("k", load))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, one, slow)
        await slow.begun.wait()
        for _ in range(3):
            tasks.start_soon(ask, other, never)
        await anyio.wait_all_tasks_blocked()
        slow.go_on.set()
    assert values == [VALUE] * 4


@pytest.mark.parametrize("place", ["memory"], indirect=True)
@pytest.mark.parametrize("value", [VALUE, 7, object()], ids=["a value", "a number", "an unencodable value"])
async def test_a_value_that_is_not_stored_comes_to_those_who_wait_elsewhere_all_the_same(
    caches: tuple[Cache, Cache], value: Any
) -> None:
    one, other = caches
    slow = Slow(LoadResult(value, store=False))
    values: list[Any] = []

    async def ask(cache: Cache, load: Any) -> None:
        values.append(await cache.get_or_load("k", load))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, one, slow)
        await slow.begun.wait()
        # A value that cannot be encoded cannot be passed on, so a waiter is granted the lease and loads.
        tasks.start_soon(ask, other, loader_of(NEWER) if type(value) is object else never)
        await anyio.wait_all_tasks_blocked()
        slow.go_on.set()
    assert [each for each in values if each is not value] in ([], [NEWER], [value])
    assert len(values) == 2
    assert not await one.exists("k") or type(value) is object


async def test_many_at_a_time(caches: tuple[Cache, Cache]) -> None:
    one, other = caches
    asked: list[list[str]] = []

    async def load(keys: list[str]) -> dict[str, Any]:
        asked.append(keys)
        return {key: (key, VALUE) for key in keys}

    wanted = {key: (key, VALUE) for key in ("a", "b", "c")}
    await one.set("b", wanted["b"])
    assert await one.get_or_load_many(["a", "b", "c"], load, stale_for=60) == wanted
    assert await other.get_or_load_many(["a", "b", "c"], load) == wanted
    assert asked == [["a", "c"]]


async def test_a_decorated_function(caches: tuple[Cache, Cache]) -> None:
    _, other = caches
    calls: list[int] = []

    async def load(number: int) -> Any:
        calls.append(number)
        return (number, VALUE)

    cached = [each.cached(key="load:{number}", ttl=60, stale_for=60, refresh="xfetch")(load) for each in caches]
    assert [await each(1) for each in cached * 2] == [(1, VALUE)] * 4
    assert calls == [1]
    assert await other.get("load:1") == (1, VALUE)


async def test_what_cannot_be_read_is_loaded_anew_in_its_place(redis_url: str) -> None:
    place = Place(redis_url)
    async with open_cache(place.settings(OLD_FORMAT)) as old, open_cache(place.settings(SEALED)) as new:
        other = Cache(lambda: new._node).attach(new.client)  # type: ignore[arg-type, return-value]
        await old.set("k", VALUE)
        loads = 0

        async def load() -> Any:
            nonlocal loads
            loads += 1
            await anyio.lowlevel.checkpoint()
            return NEWER

        values: list[Any] = []

        async def ask(cache: Cache) -> None:
            values.append(await cache.get_or_load("k", load, ttl=60))

        with new.events(PayloadRejected) as events:
            async with anyio.create_task_group() as tasks:
                for cache in (new, other) * 10:
                    tasks.start_soon(ask, cache)
            assert heard(events)
        assert values == [NEWER] * 20
        assert loads == 1
        assert await new.get("k") == NEWER


async def test_many_that_cannot_be_read_are_loaded_anew(redis_url: str) -> None:
    place = Place(redis_url)
    async with open_cache(place.settings(OLD_FORMAT)) as old, open_cache(place.settings(SEALED)) as new:
        await old.set_many({"a": 1.5, "b": 2.5})
        await new.set("c", 3.5)
        asked: list[list[str]] = []

        async def load(keys: list[str]) -> dict[str, Any]:
            asked.append(keys)
            return dict.fromkeys(keys, VALUE)

        assert await new.get_or_load_many(["a", "b", "c"], load) == {"a": VALUE, "b": VALUE, "c": 3.5}
        assert asked == [["a", "b"]]
        assert await new.get_many(["a", "b"]) == {"a": VALUE, "b": VALUE}


async def test_what_cannot_be_read_is_not_served_stale(redis_url: str) -> None:
    place = Place(redis_url)
    async with open_cache(place.settings(OLD_FORMAT)) as old, open_cache(place.settings(SEALED)) as new:
        await old.get_or_load("k", loader_of(VALUE), ttl=0.02, stale_for=60)
        await over(old, "k")
        with pytest.raises(OSError, match="away"):
            await new.get_or_load("k", broken, stale_for=60)
        go_on, begun = anyio.Event(), anyio.Event()

        async def slow() -> Any:
            begun.set()
            await go_on.wait()
            return VALUE

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(old.get_or_load, "k", slow)
            await begun.wait()
            # The stale value in the reply cannot be served, so the caller waits for the other process, and then loads.
            value = await new.get_or_load("k", loader_of(NEWER), soft_timeout=0, wait_limit=0.05)
            assert value == NEWER
            go_on.set()
        assert await old.get("k") == VALUE


async def test_what_redis_itself_cannot_read_is_loaded_anew(redis_url: str) -> None:
    import redis

    for damage in (b"x", b"no header of ours at all", b"\0" * 16 + b"?" + b"damage"):
        place = Place(redis_url)
        async with open_cache(place.settings(SEALED)) as cache:
            with redis.Redis.from_url(redis_url) as client:
                client.set(f"{place.namespace}:k", damage)
            assert await cache.get_or_load("k", loader_of(VALUE)) == VALUE, damage
            assert await cache.get_or_load("k", never) == VALUE, damage


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_over_a_synchronous_cache(place: Place, payload: dict[str, Any]) -> None:
    with open_sync_cache(place.settings(payload)) as cache:
        assert cache.get_or_load("k", lambda: VALUE, stale_for=60) == VALUE
        assert cache.get_or_load("k", lambda: 1 / 0) == VALUE
        assert cache.get_or_load_many(["k", "j"], lambda keys: dict.fromkeys(keys, NEWER)) == {"k": VALUE, "j": NEWER}
        assert cache.cached(key="k")(lambda: None)() == VALUE
        cache.set("soon", 1, ttl=60)
        assert cache.get_or_load("soon", lambda: 2) == 1
