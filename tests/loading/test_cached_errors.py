"""Caching of exceptions at the request of a caller, on every store."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import uuid4

import anyio
import pytest

from cachebus import Cache, CacheKeyError, Missing, Node, Settings, SyncCache, open_cache, open_sync_cache
from cachebus.messages import LoadFailed
from cachebus.testing.servers import Server, memcached_server, nats_server, redis_server

from ..clock import ManualClock
from ..facade.faces import a_cache
from .failing import KEPT, Failing, Gone, NotFound, raised
from .slow import Slow

__all__ = ["memcached_server", "nats_server", "redis_server"]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


Open = Callable[[], AbstractAsyncContextManager[Cache]]
STORES = [
    "memory",
    "memory, msgpack",
    "memory, json",
    "memory, queued",
    "redis",
    "redis, sealed",
    "memcached",
    "worker",
]


@pytest.fixture(params=STORES)
async def opened(
    request: pytest.FixtureRequest, redis_server: Server, memcached_server: Server, nats_server: Server
) -> AsyncIterator[Open]:
    """Opens caches on each kind of store. Memory stores are opened once."""
    where: dict[str, Any] = {"namespace": f"t{uuid4().hex}", "on_error": "raise"}
    key = f"base64:{base64.b64encode(bytes(32)).decode()}"
    match request.param.split(", "):
        case ["memory"]:
            where |= {"backend": "memory://"}
        case ["memory", "queued"]:
            where |= {"backend": "memory://", "actors": {"inline_turns": False}}
        case ["memory", serializer]:
            where |= {"backend": "memory://", "payload": {"serializer": serializer}}
        case ["redis"]:
            where |= {"backend": redis_server.url}
        case ["redis", "sealed"]:
            where |= {"backend": redis_server.url, "payload": {"encryption_keys": {"one": key}, "serializer": "json"}}
        case ["memcached"]:
            where |= {"backend": memcached_server.url}
        case _:
            serving = {"namespace": where["namespace"], "bus": nats_server.url}
            async with Node(Settings(backends=["memory://"], **serving), serve=True):  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType, reportCallIssue]
                yield lambda: open_cache("bus:primary", bus=nats_server.url, **where)
            return
    backend = where.pop("backend")
    yield lambda: open_cache(backend, **where)


@pytest.fixture
async def cache(opened: Open) -> AsyncIterator[Cache]:
    async with opened() as cache:
        yield cache


async def test_what_was_asked_for_is_raised_again_without_asking_the_loader(cache: Cache) -> None:
    load = Failing()
    first = await raised(cache, load, **KEPT)
    again = [await raised(cache, load, **KEPT) for _ in range(3)]
    assert load.calls == 1
    assert first is load.error
    for each in again:
        assert type(each) is NotFound
        assert (str(each), each.args, each.number) == ("no row 7", ("no row 7",), 7)
        assert each is not load.error, "an exception of each caller's own: raising it adds to its traceback"


async def test_nothing_is_kept_that_was_not_asked_for(cache: Cache) -> None:
    load = Failing()
    others: dict[str, Any] = {"cache_errors": (ValueError, KeyError), "error_ttl": 60}
    for options in ({}, others):
        calls = load.calls
        for _ in range(2):
            assert await raised(cache, load, **options) is load.error
        assert load.calls == calls + 2
    assert not await cache.exists("k")


async def test_to_all_others_the_key_has_no_value(cache: Cache) -> None:
    load = Failing()
    await raised(cache, load, **KEPT)
    assert await cache.get("k", "nothing") == "nothing"
    assert isinstance(await cache.lookup("k"), Missing)
    assert await cache.get_many(["k", "j"]) == {}
    assert await cache.get_typed("k", int, "nothing") == "nothing"
    assert type(await raised(cache, load, **KEPT)) is NotFound
    assert load.calls == 1, "and looking takes nothing away"


@pytest.mark.parametrize("options", [{}, {"cache_errors": KeyError, "error_ttl": 60}])
async def test_who_does_not_ask_for_it_loads_anew_in_its_place(cache: Cache, options: Any) -> None:
    load = Failing()
    await raised(cache, load, **KEPT)
    load.works = True
    assert await cache.get_or_load("k", load, **options) == 2
    assert await cache.get("k") == 2
    assert await cache.get_or_load("k", load, **KEPT) == 2, "for all callers"


async def test_of_a_class_that_is_listed_its_children_are_too(cache: Cache) -> None:
    load = Failing(Gone(8))
    options: dict[str, Any] = {"cache_errors": LookupError, "error_ttl": 60}
    await raised(cache, load, **options)
    again = await raised(cache, load, **options)
    assert (type(again), load.calls) == (Gone, 1)
    assert await raised(cache, load, cache_errors=[KeyError], error_ttl=60) is load.error
    assert load.calls == 2


@pytest.mark.parametrize("how", ["delete", "clear", "tag", "set"])
async def test_whatever_removes_a_value_removes_it(cache: Cache, how: str) -> None:
    load = Failing()
    tags = ["rows"] if how == "tag" else []
    if how == "tag" and "tags" not in (await capabilities(cache)):
        pytest.skip("the store has no tags")
    await raised(cache, load, tags=tags, **KEPT)
    if how == "delete":
        assert await cache.delete("k")
    elif how == "clear":
        await cache.clear()
    elif how == "tag":
        await cache.invalidate_tags("rows")
    else:
        await cache.set("k", 5)
        assert await cache.get_or_load("k", load, **KEPT) == 5
        return
    load.works = True
    assert await cache.get_or_load("k", load, **KEPT) == 2


async def capabilities(cache: Cache) -> tuple[str, ...]:
    from cachebus.messages import Describe

    return (await cache.client.request(Describe())).capabilities


async def test_what_is_invalidated_during_the_load_is_not_kept(cache: Cache) -> None:
    if "leases" not in await capabilities(cache):
        pytest.skip("the store has no leases")
    calls = 0

    async def load() -> int:
        nonlocal calls
        calls += 1
        await cache.delete("k")
        raise NotFound(calls)

    for expected in (1, 2):
        error: Any = await raised(cache, load, **KEPT)
        assert error.number == expected


async def test_those_who_wait_get_it_too(opened: Open, cache: Cache, request: pytest.FixtureRequest) -> None:
    load = Slow(NotFound(7))
    errors = list[Exception]()

    async def ask(which: Cache) -> None:
        errors.append(await raised(which, load, **KEPT))

    shared = "redis" in request.node.name or "worker" in request.node.name
    async with opened() as other, anyio.create_task_group() as tasks:
        tasks.start_soon(ask, cache)
        await load.begun.wait()
        for which in [cache] * 3 + [other] * 3 * shared:
            tasks.start_soon(ask, which)
        await anyio.sleep(0.05)  # The other callers have sent their requests; they need not be waiting yet.
        load.go_on.set()
    assert [str(each) for each in errors] == ["no row 7"] * (4 + 3 * shared)
    assert load.calls == 1


async def test_a_loader_of_many_meets_it_as_a_miss(cache: Cache) -> None:
    await raised(cache, Failing(), **KEPT)
    await cache.set("j", 1)

    async def load(keys: list[str]) -> dict[str, int]:
        return dict.fromkeys(keys, 2)

    assert await cache.get_or_load_many(["j", "k", "l"], load) == {"j": 1, "k": 2, "l": 2}
    assert await cache.get("k") == 2


async def test_a_decorated_function_may_ask_for_it(cache: Cache) -> None:
    calls = 0

    @cache.cached(key="row:{number}", cache_errors=NotFound, error_ttl=60)
    async def row(number: int) -> int:
        nonlocal calls
        calls += 1
        raise NotFound(number)

    for number in (1, 2, 1, 2):
        with pytest.raises(NotFound, match=f"no row {number}"):
            await row(number)
    assert calls == 2


# TTLs, and stale values


async def test_it_is_kept_for_its_own_time() -> None:
    clock = ManualClock()
    async with a_cache(clock=clock) as cache:
        load = Failing()
        options: dict[str, Any] = {"cache_errors": NotFound, "error_ttl": 5, "ttl": 3600, "negative_ttl": 100}
        await raised(cache, load, **options)
        clock.advance(4.9)
        await raised(cache, load, **options)
        assert load.calls == 1
        clock.advance(0.1)
        await raised(cache, load, **options)
        assert load.calls == 2
        load.works = True
        clock.advance(5)
        assert await cache.get_or_load("k", load, **options) == 3
        assert await cache.ttl("k") == 3600


async def test_jitter_is_for_it_too() -> None:
    clock = ManualClock()
    async with a_cache(clock=clock) as cache:
        for at in range(20):
            await raised(cache, Failing(), f"k{at}", cache_errors=NotFound, error_ttl=10, ttl_jitter=0.5)
        times = [await cache.ttl(f"k{at}") for at in range(20)]
        assert all(time is not None and 5 < time <= 10 for time in times)
        assert len(set(times)) > 10


async def test_where_a_stale_value_is_served_nothing_is_kept() -> None:
    clock = ManualClock()
    async with a_cache(clock=clock) as cache:
        load = Failing()
        load.works = True
        options: dict[str, Any] = {"ttl": 10, "stale_for": 100, **KEPT}
        assert await cache.get_or_load("k", load, **options) == 1
        load.works = False
        clock.advance(10)
        assert [await cache.get_or_load("k", load, **options) for _ in range(2)] == [1, 1]
        assert load.calls == 3
        clock.advance(101)
        await raised(cache, load, **options)
        await raised(cache, load, **options)
        assert load.calls == 4


async def test_a_live_value_that_could_not_be_loaded_anew_stays() -> None:
    clock = ManualClock()
    async with a_cache(clock=clock) as cache:
        load = Failing()
        load.works = True
        options: dict[str, Any] = {"ttl": 100, "refresh_after": 10, **KEPT}
        await cache.get_or_load("k", load, **options)
        load.works = False
        clock.advance(50)
        async with cache.events(LoadFailed) as events:
            assert await cache.get_or_load("k", load, **options) == 1
            assert isinstance(await anext(events), LoadFailed)
        assert await cache.get("k") == 1


# Options, and synchronous caches


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"cache_errors": NotFound}, ValueError, "error_ttl"),
        ({"error_ttl": 5}, ValueError, "cache_errors"),
        ({"cache_errors": (), "error_ttl": 5}, ValueError, "cache_errors"),
        ({"cache_errors": NotFound, "error_ttl": 0}, ValueError, "error_ttl"),
        ({"cache_errors": NotFound, "error_ttl": "5"}, TypeError, "error_ttl"),
        ({"cache_errors": "NotFound", "error_ttl": 5}, TypeError, "cache_errors"),
        ({"cache_errors": (NotFound(1),), "error_ttl": 5}, TypeError, "cache_errors"),
        ({"cache_errors": KeyboardInterrupt, "error_ttl": 5}, TypeError, "cache_errors"),
    ],
)
async def test_options_that_make_no_sense_are_named(options: Any, kind: type[Exception], words: str) -> None:
    async with a_cache() as cache:
        with pytest.raises(kind, match=words):
            await cache.get_or_load("k", Failing(), **options)
        with pytest.raises(kind, match=words):
            cache.cached(key="k", **options)


@pytest.fixture(params=["memory://", "redis"])
def sync_cache(request: pytest.FixtureRequest, redis_server: Server) -> Iterator[SyncCache]:
    url = redis_server.url if request.param == "redis" else request.param
    with open_sync_cache(url, namespace=f"t{uuid4().hex}") as cache:
        yield cache


def test_a_sync_cache_keeps_them_too(sync_cache: SyncCache) -> None:
    calls = 0

    def load() -> int:
        nonlocal calls
        calls += 1
        raise CacheKeyError("no row", "7")

    row = sync_cache.cached(key="row", cache_errors=CacheKeyError, error_ttl=60)(load)
    for _ in range(2):
        with pytest.raises(CacheKeyError, match="no row, not 7") as caught:
            sync_cache.get_or_load("k", load, cache_errors=CacheKeyError, error_ttl=60)
        assert caught.value.key == "7"
        with pytest.raises(CacheKeyError):
            row()
    assert calls == 2
    assert sync_cache.get("k") is None
    assert sync_cache.get_many(["k", "row"]) == {}
    assert sync_cache.get_or_load("k", lambda: 5) == 5
