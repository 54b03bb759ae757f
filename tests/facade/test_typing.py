"""Types of the public API. mypy and pyright check this file; pytest runs it too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

from cachebus import (
    Cache,
    Event,
    Found,
    Health,
    Missing,
    Snapshot,
    Subscription,
    SyncCache,
    escape_pattern,
    open_cache,
    open_sync_cache,
)
from cachebus.messages import CacheHit

from .faces import a_cache, a_sync_cache


async def test_the_methods_of_the_asynchronous_cache() -> None:
    async with a_cache() as cache:
        assert_type(cache, Cache)
        assert_type(await cache.set("key", 1, ttl=60, tags=["tag"], only_if="absent"), bool)
        assert_type(await cache.get("key"), Any)
        assert_type(await cache.get("key", default=5), Any)
        assert_type(await cache.lookup("key"), Found | Missing)
        assert_type(await cache.get_many(["key"]), dict[str, Any])
        assert_type(await cache.set_many({"other": 1}), None)
        assert_type(await cache.add("key", 1), bool)
        assert_type(await cache.exists("key"), bool)
        assert_type(await cache.ttl("key"), float | None)
        assert_type(await cache.touch("key", ttl=None), bool)
        assert_type(await cache.increment("n"), int)
        assert_type(await cache.compare_and_set("key", 2, version=1.0), bool)
        assert_type(await cache.delete("key"), bool)
        assert_type(await cache.delete_many(["key"]), int)
        assert_type(await cache.delete_pattern(escape_pattern("key")), int)
        assert_type(await cache.invalidate_tags("tag"), None)
        assert_type(cache.scan(), AsyncIterator[str])
        async for key in cache.scan("*"):
            assert_type(key, str)
        assert_type(await cache.clear(), None)
        assert_type(await cache.statistics(), Snapshot)
        assert_type(await cache.health(), Health)
        with cache.events(CacheHit, "cache_*") as events:
            assert_type(events, Subscription)
            assert_type(events.next(0), Event | None)
        assert_type(await cache.close(), None)


def test_the_methods_of_the_synchronous_cache() -> None:
    with a_sync_cache() as cache:
        assert_type(cache, SyncCache)
        assert_type(cache.set("key", 1, ttl=60, tags=["tag"], only_if="absent"), bool)
        assert_type(cache.get("key"), Any)
        assert_type(cache.get("key", default=5), Any)
        assert_type(cache.lookup("key"), Found | Missing)
        assert_type(cache.get_many(["key"]), dict[str, Any])
        assert_type(cache.set_many({"other": 1}), None)
        assert_type(cache.add("key", 1), bool)
        assert_type(cache.exists("key"), bool)
        assert_type(cache.ttl("key"), float | None)
        assert_type(cache.touch("key", ttl=None), bool)
        assert_type(cache.increment("n"), int)
        assert_type(cache.compare_and_set("key", 2, version=1.0), bool)
        assert_type(cache.delete("key"), bool)
        assert_type(cache.delete_many(["key"]), int)
        assert_type(cache.delete_pattern("key"), int)
        assert_type(cache.invalidate_tags("tag"), None)
        assert_type(cache.scan(), Iterator[str])
        assert_type(cache.clear(), None)
        assert_type(cache.statistics(), Snapshot)
        assert_type(cache.health(), Health)
        with cache.events() as events:
            assert_type(events.next(0), Event | None)
        assert_type(cache.close(), None)


async def test_a_match_on_a_lookup_has_two_cases() -> None:
    async with a_cache() as cache:
        match await cache.lookup("key"):
            case Found() as found:
                assert_type(found.value, Any)
                assert_type(found.version, float)
                assert_type(found.ttl, float | None)
                assert_type(found.tags, tuple[str, ...])
                assert_type(found.stored_at, float)
            case Missing() as missing:
                assert_type(missing, Missing)


async def test_a_decorated_coroutine_function_keeps_its_type() -> None:
    async with a_cache() as cache:

        @cache.cached(key="user:{user_id}", ttl=60)
        async def load(user_id: int, *, flag: bool = False) -> list[str]:
            return [str(user_id)]

        assert_type(await load(1), list[str])
        assert_type(await load(user_id=1, flag=True), list[str])
        # These are type errors. An unnecessary ignore would be an error, too.
        refused = False
        try:
            await load("1", flg=True)  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
        except TypeError:
            refused = True
        assert refused


def test_a_decorated_plain_function_keeps_its_type() -> None:
    with a_sync_cache() as cache:

        @cache.cached(key="{number}")
        def double(number: float) -> float:
            return number * 2

        assert_type(double(1.5), float)
        assert double(number=1.5) == 3.0

        @cache.cached(key="{number}")
        async def later(number: int) -> str:
            return str(number)

        coroutine = later(1)
        coroutine.close()


async def test_a_decorated_method_keeps_its_type() -> None:
    cache = a_cache()

    class Repository:
        @cache.cached(key="row:{number}")
        async def row(self, number: int) -> bytes:
            return bytes(number)

        @cache.cached(key=lambda self, number: f"plain:{number}")
        def plain(self, number: int) -> bytes:
            return bytes(number)

    async with cache:
        repository = Repository()
        assert_type(await repository.row(2), bytes)
        assert_type(repository.plain(number=2), bytes)


def test_the_front_doors_say_what_they_open() -> None:
    assert_type(open_cache("memory://", namespace="shop"), Cache)
    assert_type(open_sync_cache({"timeout": 1.0}), SyncCache)
