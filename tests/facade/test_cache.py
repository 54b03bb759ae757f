"""Both facades, method by method: they behave the same, with and without inline turns."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable, Coroutine
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from cachebus import (
    Cache,
    CacheClosed,
    CacheError,
    CacheKeyError,
    CacheTimeoutError,
    Found,
    Health,
    Missing,
    SyncCache,
    WrongType,
    open_cache,
    open_sync_cache,
)
from cachebus.bus import TURNS_PER_CHECKPOINT
from cachebus.client.background_loop import run
from cachebus.facade.rate_limiter import RateLimiter
from cachebus.messages import (
    CacheCleared,
    CacheDeleted,
    CacheEvicted,
    CacheExpired,
    CacheHit,
    CacheMiss,
    CacheSet,
    LockNotAcquired,
    LockNotHeld,
    TagsInvalidated,
)

from ..clock import ManualClock
from .faces import SilentStore, a_cache, a_sync_cache, awaited, heard, settings

Behaviour = Callable[[Cache, ManualClock], Coroutine[Any, Any, None]]
Call = Callable[[Cache], Coroutine[Any, Any, Any]]
CallWith = Callable[[Cache, Any], Coroutine[Any, Any, Any]]
BEHAVIOURS: list[Behaviour] = []


def behaviour(function: Behaviour) -> Behaviour:
    """Register a behaviour of both facades."""
    BEHAVIOURS.append(function)
    return function


# Reading


@behaviour
async def get_gives_the_value_or_the_default(cache: Cache, clock: ManualClock) -> None:
    assert await cache.get("key") is None
    assert await cache.get("key", 5) == 5
    assert await cache.get("key", default="x") == "x"
    await cache.set("key", [1])
    assert await cache.get("key", 5) == [1]


@behaviour
async def a_cached_none_is_not_a_miss(cache: Cache, clock: ManualClock) -> None:
    await cache.set("none", None)
    assert await cache.get("none", "default") is None
    assert await cache.get("missing", "default") == "default"
    assert isinstance(await cache.lookup("none"), Found)
    assert await cache.exists("none") is True
    assert await cache.get_many(["none", "missing"]) == {"none": None}
    assert await cache.add("none", 1) is False


@behaviour
async def lookup_tells_all_about_a_value(cache: Cache, clock: ManualClock) -> None:
    await cache.set("key", "value", ttl=10, tags=["a", "b", "a"])
    stored_at = clock.wall()
    clock.advance(4)
    found = await cache.lookup("key")
    assert isinstance(found, Found)
    assert (found.value, found.ttl, found.tags) == ("value", 6.0, ("a", "b"))
    assert found.stored_at == pytest.approx(stored_at, abs=1e-3)
    assert await cache.lookup("missing") == Missing()


@behaviour
async def get_many_gives_what_is_there(cache: Cache, clock: ManualClock) -> None:
    await cache.set_many({"a": 1, "b": 2})
    assert await cache.get_many(["a", "missing", "b", "a"]) == {"a": 1, "b": 2}
    assert await cache.get_many(key for key in "ab") == {"a": 1, "b": 2}
    assert await cache.get_many([]) == {}


@behaviour
async def exists_and_ttl_tell_of_live_values_and_count_nothing(cache: Cache, clock: ManualClock) -> None:
    await cache.set("key", 1, ttl=10)
    await cache.set("for ever", 1)
    clock.advance(4)
    assert [await cache.exists(key) for key in ("key", "for ever", "missing")] == [True, True, False]
    assert [await cache.ttl(key) for key in ("key", "for ever", "missing")] == [6.0, None, 0.0]
    clock.advance(6)
    assert await cache.exists("key") is False
    assert await cache.ttl("key") == 0.0
    assert (await cache.statistics()).requests == 0


@behaviour
async def a_lock_has_one_holder(cache: Cache, clock: ManualClock) -> None:
    lock = await plain(cache.lock("a", owner="me", wait=0))
    await plain(lock.acquire())
    with pytest.raises(LockNotAcquired):
        await plain((await plain(cache.lock("a", wait=0))).acquire())
    info: Any = await plain(lock.info())
    assert (info.owner, info.token, info.remaining) == ("me", lock.token, 30.0)
    await plain(lock.extend(60))
    clock.advance(59)
    assert lock.held
    await plain(lock.release())
    assert not await plain(lock.is_locked())
    with pytest.raises(LockNotHeld):
        await plain(lock.release())


async def plain(result: Any) -> Any:
    """Return the result of a method of either facade."""
    return await result if inspect.isawaitable(result) else result


@behaviour
async def scan_lists_the_keys_that_match(cache: Cache, clock: ManualClock) -> None:
    await cache.set_many(dict.fromkeys(["a:1", "a:2", "b:1", "*"], 0))
    await cache.set("a:gone", 0, ttl=1)
    clock.advance(1)
    assert sorted([key async for key in cache.scan()]) == ["*", "a:1", "a:2", "b:1"]
    assert sorted([key async for key in cache.scan("a:*")]) == ["a:1", "a:2"]
    assert [key async for key in cache.scan(r"\*")] == ["*"]
    assert [key async for key in cache.scan("nothing")] == []


# Writing


@behaviour
async def set_stores_and_overwrites(cache: Cache, clock: ManualClock) -> None:
    assert await cache.set("key", 1) is True
    assert await cache.set("key", 2) is True
    assert await cache.get("key") == 2


@behaviour
async def set_takes_conditions(cache: Cache, clock: ManualClock) -> None:
    assert await cache.set("key", 1, only_if="present") is False
    assert await cache.set("key", 1, only_if="absent") is True
    assert await cache.set("key", 2, only_if="absent") is False
    assert await cache.get("key") == 1
    assert await cache.set("key", 3, only_if="present") is True
    assert await cache.get("key") == 3


@behaviour
async def times_to_live_are_numbers_timedeltas_or_none(cache: Cache, clock: ManualClock) -> None:
    times: list[tuple[Any, float | None]] = [
        (5, 5.0),
        (0.25, 0.25),
        (timedelta(minutes=1), 60.0),
        (None, None),
        ("default", None),
        (1e12, 1e12),
    ]
    for ttl, left in times:
        await cache.set("key", 1, ttl=ttl)
        assert await cache.ttl("key") == left


@behaviour
async def every_write_takes_a_time_to_live(cache: Cache, clock: ManualClock) -> None:
    await cache.set("set", 1, ttl=5)
    await cache.set_many({"set_many": 1}, ttl=5)
    await cache.add("add", 1, ttl=5)
    await cache.increment("increment", ttl=5)
    await cache.set("compare_and_set", 1)
    found = await cache.lookup("compare_and_set")
    assert isinstance(found, Found)
    await cache.compare_and_set("compare_and_set", 2, version=found.version, ttl=5)
    await cache.set("touch", 1)
    await cache.touch("touch", ttl=5)
    names = ["set", "set_many", "add", "increment", "compare_and_set", "touch"]
    assert [await cache.ttl(name) for name in names] == [5.0] * 6
    clock.advance(5)
    assert await cache.get_many(names) == {}


@behaviour
async def every_write_takes_tags(cache: Cache, clock: ManualClock) -> None:
    await cache.set("set", 1, tags=["tag"])
    await cache.set_many({"set_many": 1}, tags=("tag",))
    await cache.add("add", 1, tags={"tag"})
    await cache.set("compare_and_set", 1)
    found = await cache.lookup("compare_and_set")
    assert isinstance(found, Found)
    await cache.compare_and_set("compare_and_set", 2, version=found.version, tags=iter(["tag"]))
    names = ["set", "set_many", "add", "compare_and_set"]
    assert len(await cache.get_many(names)) == 4
    await cache.invalidate_tags("tag")
    assert await cache.get_many(names) == {}


@behaviour
async def add_stores_only_where_there_is_nothing(cache: Cache, clock: ManualClock) -> None:
    assert await cache.add("key", 1, ttl=1) is True
    assert await cache.add("key", 2) is False
    assert await cache.get("key") == 1
    clock.advance(1)
    assert await cache.add("key", 3) is True


@behaviour
async def compare_and_set_stores_only_over_the_version_read(cache: Cache, clock: ManualClock) -> None:
    await cache.set("key", 1)
    found = await cache.lookup("key")
    assert isinstance(found, Found)
    assert await cache.compare_and_set("key", 2, version=found.version) is True
    assert await cache.compare_and_set("key", 3, version=found.version) is False
    assert await cache.compare_and_set("missing", 3, version=found.version) is False
    assert await cache.get_many(["key", "missing"]) == {"key": 2}


@behaviour
async def touch_gives_a_live_value_more_time(cache: Cache, clock: ManualClock) -> None:
    await cache.set("key", 1, ttl=1)
    assert await cache.touch("key", ttl=10) is True
    assert await cache.ttl("key") == 10.0
    assert await cache.touch("key") is True
    assert await cache.ttl("key") is None
    assert await cache.touch("missing", ttl=10) is False
    assert await cache.exists("missing") is False


@behaviour
async def increment_counts(cache: Cache, clock: ManualClock) -> None:
    assert await cache.increment("n") == 1
    assert await cache.increment("n", 5) == 6
    assert await cache.increment("n", -10) == -4
    assert await cache.increment("m", 2, initial=40) == 42
    assert await cache.get("n") == -4


@behaviour
async def increment_keeps_the_time_that_a_counter_has(cache: Cache, clock: ManualClock) -> None:
    await cache.increment("n", ttl=10)
    clock.advance(4)
    await cache.increment("n", ttl=1_000)
    assert await cache.ttl("n") == 6.0


@behaviour
async def increment_without_an_initial_value_needs_a_counter(cache: Cache, clock: ManualClock) -> None:
    with pytest.raises(CacheKeyError, match="there is no counter under the key, and initial is None"):
        await cache.increment("n", initial=None)
    assert await cache.exists("n") is False
    await cache.set("n", 1)
    assert await cache.increment("n", initial=None) == 2


@behaviour
async def increment_refuses_what_is_no_integer(cache: Cache, clock: ManualClock) -> None:
    await cache.set("key", "text")
    with pytest.raises(WrongType, match="increment requires an int, not str"):
        await cache.increment("key")
    await cache.set("key", 2**63 - 1)
    with pytest.raises(WrongType, match="64-bit"):
        await cache.increment("key")
    assert await cache.get("key") == 2**63 - 1


@behaviour
async def set_many_stores_all(cache: Cache, clock: ManualClock) -> None:
    await cache.set_many({f"k{number}": number for number in range(100)})
    assert len(await cache.get_many(f"k{number}" for number in range(200))) == 100
    await cache.set_many({})


# Removing


@behaviour
async def delete_says_whether_there_was_a_value(cache: Cache, clock: ManualClock) -> None:
    await cache.set("key", None)
    assert await cache.delete("key") is True
    assert await cache.delete("key") is False
    await cache.set("key", 1, ttl=1)
    clock.advance(1)
    assert await cache.delete("key") is False


@behaviour
async def delete_many_says_how_many_there_were(cache: Cache, clock: ManualClock) -> None:
    await cache.set_many({"a": 1, "b": 2, "c": 3})
    assert await cache.delete_many(["a", "b", "a", "missing"]) == 2
    assert await cache.delete_many([]) == 0
    assert [key async for key in cache.scan()] == ["c"]


@behaviour
async def delete_pattern_removes_what_matches(cache: Cache, clock: ManualClock) -> None:
    await cache.set_many(dict.fromkeys(["user:1", "user:2", "user*", "team:1"], 0))
    assert await cache.delete_pattern(r"user\*") == 1
    assert await cache.delete_pattern("user:?") == 2
    assert await cache.delete_pattern("user:?") == 0
    assert [key async for key in cache.scan()] == ["team:1"]


@behaviour
async def invalidate_tags_removes_what_was_stored_before(cache: Cache, clock: ManualClock) -> None:
    await cache.set("a", 1, tags=["red"])
    await cache.set("b", 1, tags=["green"])
    await cache.set("c", 1, tags=["blue"])
    await cache.invalidate_tags("red", "green", "red", "unknown")
    assert await cache.get_many(["a", "b", "c"]) == {"c": 1}
    await cache.set("a", 2, tags=["red"])
    assert await cache.get("a") == 2
    await cache.invalidate_tags()
    assert await cache.get("a") == 2


@behaviour
async def clear_removes_everything(cache: Cache, clock: ManualClock) -> None:
    await cache.set_many({"a": 1, "b": 2}, ttl=5, tags=["tag"])
    await cache.clear()
    assert [key async for key in cache.scan()] == []
    await cache.set("a", 3, tags=["tag"])
    assert await cache.get("a") == 3


# Keys


@behaviour
async def any_text_is_a_key(cache: Cache, clock: ManualClock) -> None:
    keys = ["a b", "a\r\nb", "a\0b", "a.b", "a.>", "*", "$SYS.x", "ключ", "🔑", " ", "x" * 1_000_000, "a:b", "\x7f"]
    await cache.set_many({key: key for key in keys})
    for key in keys:
        assert await cache.get(key) == key
    assert sorted([key async for key in cache.scan()]) == sorted(keys)


@behaviour
async def a_subclass_of_str_is_the_same_key(cache: Cache, clock: ManualClock) -> None:
    class Name(str):
        __slots__ = ()

    await cache.set(Name("key"), 1)
    assert await cache.get("key") == await cache.get(Name("key")) == 1


# Events


@behaviour
async def events_say_what_happened_in_order(cache: Cache, clock: ManualClock) -> None:
    with cache.events() as events:
        await cache.get("key")
        await cache.set("key", 1, ttl=10, tags=["tag"])
        await cache.get("key")
        await cache.get_many(["key", "other"])
        await cache.exists("key")
        await cache.delete("key")
        await cache.delete("key")
        await cache.set("key", 2, ttl=10)
        clock.advance(10)
        await cache.get("key")
        await cache.invalidate_tags("tag")
        await cache.clear()
        said = heard(events)
    # The actor may have started before or after the subscription.
    kinds = [type(event) for event in said if event.backend]
    assert kinds == [
        *(CacheMiss, CacheSet, CacheHit, CacheHit, CacheMiss, CacheDeleted, CacheSet),
        *(CacheExpired, CacheMiss, TagsInvalidated, CacheCleared),
    ]
    stored = said[1]
    assert isinstance(stored, CacheSet)
    assert (stored.key, stored.ttl, stored.tags) == ("key", 10.0, ("tag",))
    assert {event.backend for event in said} == {"primary"}
    assert [event.seq for event in said] == sorted({event.seq for event in said})
    assert len({event.id for event in said}) == len(said)


@behaviour
async def events_can_be_chosen_by_class_and_by_name(cache: Cache, clock: ManualClock) -> None:
    with cache.events(CacheHit) as hits, cache.events("cache_[sd]*") as writes:
        await cache.get("key")
        await cache.set("key", 1)
        await cache.get("key")
        await cache.delete("key")
        assert [type(event) for event in heard(hits)] == [CacheHit]
        assert [type(event) for event in heard(writes)] == [CacheSet, CacheDeleted]
    with pytest.raises(ValueError, match="unknown kind of event 'cache_hits'"):
        cache.events("cache_hits")


@behaviour
async def a_listener_that_does_not_listen_loses_events_and_counts_them(cache: Cache, clock: ManualClock) -> None:
    with cache.events(CacheSet, capacity=2) as events:
        for number in range(5):
            await cache.set(f"k{number}", number)
        assert (len(events), events.dropped) == (2, 3)


@behaviour
async def evictions_are_events(cache: Cache, clock: ManualClock) -> None:
    with cache.events(CacheEvicted) as events:
        await cache.set_many({f"k{number}": number for number in range(1_010)})
        assert len(heard(events)) == 10
    assert (await cache.statistics()).removals["size"] == 10


@behaviour
async def statistics_count_what_was_done(cache: Cache, clock: ManualClock) -> None:
    await cache.set("a", 1)
    await cache.set("a", 2)
    await cache.set("b", 1, ttl=1)
    await cache.get("a")
    await cache.get("missing")
    await cache.get_many(["a", "b", "missing"])
    clock.advance(1)
    await cache.get("b")
    await cache.delete("a")
    found = await cache.statistics()
    assert (found.hits, found.misses, found.sets, found.entries) == (3, 3, 3, 0)
    assert found.removals == {"explicit": 1, "replaced": 1, "expired": 1, "size": 0}
    assert (found.requests, found.hit_rate) == (6, 0.5)
    assert (found.address, found.store, found.max_entries, found.restarts) == ("backend.primary", "memory", 1_000, 0)


@behaviour
async def health_is_well(cache: Cache, clock: ManualClock) -> None:
    health = await cache.health()
    assert health == Health(True, "backend.primary", 0.0)


# Refused arguments

A_LONG_NUMBER = 10**400


async def limited(cache: Any, key: Any) -> Any:
    limit = await cache.rate_limit(key, 1, 1)
    return limit.check() if isinstance(limit, RateLimiter) else limit


KEY_METHODS: dict[str, CallWith] = {
    "rate_limit": limited,
    "get": lambda cache, key: cache.get(key),
    "lookup": lambda cache, key: cache.lookup(key),
    "exists": lambda cache, key: cache.exists(key),
    "ttl": lambda cache, key: cache.ttl(key),
    "get_many": lambda cache, key: cache.get_many(["fine", key]),
    "set": lambda cache, key: cache.set(key, 1),
    "set_many": lambda cache, key: cache.set_many({"fine": 1, key: 1}),
    "add": lambda cache, key: cache.add(key, 1),
    "compare_and_set": lambda cache, key: cache.compare_and_set(key, 1, version=1.0),
    "touch": lambda cache, key: cache.touch(key),
    "increment": lambda cache, key: cache.increment(key),
    "get_or_load": lambda cache, key: cache.get_or_load(key, lambda: 1),
    "get_or_load_many": lambda cache, key: cache.get_or_load_many(["fine", key], lambda keys: {}),
    "delete": lambda cache, key: cache.delete(key),
    "delete_many": lambda cache, key: cache.delete_many(["fine", key]),
}
BAD_KEYS: list[tuple[Any, str]] = [
    ("", "a cache key must not be empty"),
    (None, "a cache key must be a str, not NoneType"),
    (1, "a cache key must be a str, not int"),
    (b"key", "a cache key must be a str, not bytes"),
    (("a", "b"), "a cache key must be a str, not tuple"),
    ("a\ud800", r"a cache key must be valid Unicode, not 'a\\ud800'"),
]


def refuses_bad_keys(name: str) -> Behaviour:
    async def refused(cache: Cache, clock: ManualClock) -> None:
        for key, message in BAD_KEYS:
            with pytest.raises(CacheKeyError, match=f"^{message}$"):
                await KEY_METHODS[name](cache, key)
        await is_unharmed(cache)

    refused.__name__ = f"{name}_refuses_bad_keys"
    return refused


for each in KEY_METHODS:
    behaviour(refuses_bad_keys(each))


async def is_unharmed(cache: Cache) -> None:
    statistics = await cache.statistics()
    assert (statistics.sets, statistics.entries, statistics.restarts) == (0, 0, 0)
    await cache.set("fine", 1)
    assert await cache.get("fine") == 1


TTL_METHODS: dict[str, CallWith] = {
    "set": lambda cache, ttl: cache.set("key", 1, ttl=ttl),
    "set_many": lambda cache, ttl: cache.set_many({"key": 1}, ttl=ttl),
    "add": lambda cache, ttl: cache.add("key", 1, ttl=ttl),
    "compare_and_set": lambda cache, ttl: cache.compare_and_set("key", 1, version=1.0, ttl=ttl),
    "touch": lambda cache, ttl: cache.touch("key", ttl=ttl),
    "increment": lambda cache, ttl: cache.increment("key", ttl=ttl),
    "get_or_load": lambda cache, ttl: cache.get_or_load("key", lambda: 1, ttl=ttl),
    "get_or_load_many": lambda cache, ttl: cache.get_or_load_many(["key"], lambda keys: {}, ttl=ttl),
}
NOT_POSITIVE = [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, A_LONG_NUMBER, timedelta(0), timedelta(seconds=-1)]
NO_TIME = [True, "soon", "5", b"5", [5], object()]


def refuses_bad_times(name: str) -> Behaviour:
    async def refused(cache: Cache, clock: ManualClock) -> None:
        for ttl in NOT_POSITIVE:
            with pytest.raises(ValueError, match=r"ttl must be a positive, finite time, not .*; None means no expiry"):
                await TTL_METHODS[name](cache, ttl)
        for ttl in NO_TIME:
            with pytest.raises(TypeError, match="ttl must be seconds, a timedelta, None or 'default', not "):
                await TTL_METHODS[name](cache, ttl)
        await is_unharmed(cache)

    refused.__name__ = f"{name}_refuses_bad_times"
    return refused


for each in TTL_METHODS:
    behaviour(refuses_bad_times(each))

BAD_CALLS: list[tuple[str, Callable[[Any], Awaitable[Any]], type[Exception], str]] = [
    ("get_many of one str", lambda c: c.get_many("abc"), CacheKeyError, "must be a list .* not 'abc'"),
    ("delete_many of one str", lambda c: c.delete_many("abc"), CacheKeyError, "must be a list .* not 'abc'"),
    ("tags as one str", lambda c: c.set("k", 1, tags="tag"), TypeError, "tags must be a list .* not 'tag'"),
    ("add with tags as one str", lambda c: c.add("k", 1, tags="tag"), TypeError, "tags must .* not 'tag'"),
    ("set_many with tags as one str", lambda c: c.set_many({"k": 1}, tags="tag"), TypeError, "tags must .* not 'tag'"),
    ("a tag of no str", lambda c: c.set("k", 1, tags=[1]), TypeError, "a tag must be a str, not 1"),
    ("an empty tag", lambda c: c.set("k", 1, tags=["a", ""]), ValueError, "a tag must not be empty"),
    ("invalidating a tag of no str", lambda c: c.invalidate_tags(5), TypeError, "a tag must be a str, not 5"),
    ("invalidating an empty tag", lambda c: c.invalidate_tags(""), ValueError, "a tag must not be empty"),
    (
        "an unknown condition",
        lambda c: c.set("k", 1, only_if="new"),
        ValueError,
        "only_if must be 'absent', 'present' or None, not 'new'",
    ),
    ("a float to add", lambda c: c.increment("k", 1.0), TypeError, r"delta must be an int, not 1\.0"),
    ("a bool to add", lambda c: c.increment("k", True), TypeError, "delta must be an int, not True"),
    ("None to add", lambda c: c.increment("k", None), TypeError, "delta must be an int, not None"),
    ("a float to begin with", lambda c: c.increment("k", initial=0.5), TypeError, r"initial must be an int, not 0\.5"),
    ("a bool to begin with", lambda c: c.increment("k", initial=False), TypeError, "initial must be an int, not False"),
    ("too much to add", lambda c: c.increment("k", 2**63), WrongType, "64-bit"),
    ("an empty pattern", lambda c: c.delete_pattern(""), ValueError, "a pattern must be a non-empty str, not ''"),
    ("a pattern of no str", lambda c: c.delete_pattern(None), ValueError, "a non-empty str, not None"),
    ("scanning an empty pattern", lambda c: anext(c.scan("")), ValueError, "a pattern must be a non-empty str, not ''"),
]


def refuses(call: Callable[[Any], Awaitable[Any]], error: type[Exception], message: str) -> Behaviour:
    async def refused(cache: Cache, clock: ManualClock) -> None:
        with pytest.raises(error, match=message):
            await call(cache)
        await is_unharmed(cache)

    return refused


for what, bad_call, bad_error, bad_message in BAD_CALLS:
    made = refuses(bad_call, bad_error, bad_message)
    made.__name__ = f"refuses {what}"
    behaviour(made)


# The table on both facades

both_ways = pytest.mark.parametrize("inline", [True, False], ids=["inline turns", "turns by the task"])
all_behaviours = pytest.mark.parametrize("behave", BEHAVIOURS, ids=lambda behave: behave.__name__.replace("_", " "))


@both_ways
@all_behaviours
async def test_the_asynchronous_cache(behave: Behaviour, inline: bool) -> None:
    clock = ManualClock()
    async with a_cache(clock=clock, inline=inline, max_entries=1_000) as cache:
        await behave(cache, clock)


@both_ways
@all_behaviours
def test_the_synchronous_cache(behave: Behaviour, inline: bool) -> None:
    clock = ManualClock()
    with a_sync_cache(clock=clock, inline=inline, max_entries=1_000) as cache:
        run(behave(awaited(cache), clock))


def public(cls: type) -> dict[str, Any]:
    return {name: value for name, value in inspect.getmembers(cls) if not name.startswith("_")}


INSIDE = {"attach", "detach", "finish_get", "scan_page"}
"""Methods of `Cache` that are only for `SyncCache`."""


def test_both_facades_have_the_same_methods() -> None:
    assert set(public(Cache)) - set(public(SyncCache)) == INSIDE
    assert set(public(SyncCache)) - set(public(Cache)) == {"begin", "blocking_cache"}


@pytest.mark.parametrize("name", sorted(set(public(SyncCache)) - {"client", "payloads", "begin", "blocking_cache"}))
def test_both_facades_have_the_same_signatures(name: str) -> None:
    asynchronous = inspect.signature(getattr(Cache, name))
    synchronous = inspect.signature(getattr(SyncCache, name))
    assert asynchronous.parameters == synchronous.parameters
    assert str(asynchronous.return_annotation).removeprefix("Async") == str(synchronous.return_annotation).removeprefix(
        "Sync"
    )
    assert not inspect.iscoroutinefunction(getattr(SyncCache, name))
    waits = inspect.iscoroutinefunction(getattr(Cache, name)) or inspect.isasyncgenfunction(getattr(Cache, name))
    assert waits == (name not in ("cached", "events", "lock", "rate_limit"))


def test_every_method_is_in_the_table() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    unused = [
        name for name in public(Cache) if f".{name}(" not in source and name not in {*INSIDE, "client", "payloads"}
    ]
    assert unused == []


# Opening and closing


async def first_key(cache: Cache) -> str:
    return await anext(cache.scan())


EVERY_CALL: dict[str, Call] = {
    **{name: partial(lambda call, cache: call(cache, "key"), call) for name, call in KEY_METHODS.items()},
    "get_typed": lambda cache: cache.get_typed("key", int),
    "scan": first_key,
    "delete_pattern": lambda cache: cache.delete_pattern("*"),
    "invalidate_tags": lambda cache: cache.invalidate_tags("tag"),
    "clear": lambda cache: cache.clear(),
    "statistics": lambda cache: cache.statistics(),
    "health": lambda cache: cache.health(),
}


@pytest.mark.parametrize("name", EVERY_CALL)
async def test_a_cache_is_not_used_before_it_is_open_nor_after_it_was_closed(name: str) -> None:
    cache = a_cache()
    with pytest.raises(CacheClosed, match="the cache is not open: use it within `async with`"):
        await EVERY_CALL[name](cache)
    async with cache:
        pass
    with pytest.raises(CacheClosed, match="the cache is closed"):
        await EVERY_CALL[name](cache)


@pytest.mark.parametrize("name", EVERY_CALL)
def test_a_synchronous_cache_is_not_used_after_it_was_closed(name: str) -> None:
    cache = a_sync_cache()
    cache.get("key")
    cache.close()
    with pytest.raises(CacheClosed, match="the cache is closed"):
        run(EVERY_CALL[name](awaited(cache)))


async def test_listening_needs_an_open_cache() -> None:
    cache = a_cache()
    with pytest.raises(CacheClosed, match="not open"):
        cache.events()
    async with cache:
        events = cache.events(CacheSet)
        await cache.set("key", 1)
    assert [type(event) async for event in events] == [CacheSet], (
        "waiting events can still be read before the subscription ends"
    )
    with pytest.raises(CacheClosed, match="closed"):
        cache.events()


async def test_a_cache_is_opened_once() -> None:
    cache = a_cache()
    async with cache:
        with pytest.raises(CacheClosed, match="open already, or was closed; make another one"):
            await cache.__aenter__()
        await cache.set("key", 1)
        assert await cache.get("key") == 1
    with pytest.raises(CacheClosed, match="open already, or was closed; make another one"):
        await cache.__aenter__()


async def test_closing_twice_is_closing_once() -> None:
    async with a_cache() as cache:
        await cache.close()
        await cache.close()
        with pytest.raises(CacheClosed, match="the cache is closed"):
            await cache.get("key")
    await cache.close()
    synchronous = a_sync_cache()
    synchronous.close()
    synchronous.close()
    with pytest.raises(CacheClosed, match="the cache is closed"):
        synchronous.get("key")


def test_a_repr_says_where_it_leads() -> None:
    cache = a_sync_cache()
    assert repr(cache) == "<SyncCache unopened>"
    cache.get("key")
    assert repr(cache) == "<SyncCache backend.primary>"
    cache.close()
    assert repr(cache) == "<SyncCache closed>"
    assert repr(a_cache()) == "<Cache closed>"


async def test_the_repr_of_an_open_cache_says_where_it_leads() -> None:
    async with a_cache() as cache:
        assert repr(cache) == "<Cache backend.primary>"


async def test_what_the_body_raises_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with a_cache():
            raise ZeroDivisionError


def test_what_the_body_of_a_synchronous_cache_raises_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError), a_sync_cache():
        raise ZeroDivisionError


async def test_a_cache_that_could_not_open_can_be_opened_later() -> None:
    class Failing(SilentStore):
        async def open(self) -> None:
            raise CacheError("not today")

    store = SilentStore()
    store.release()
    stores: list[Any] = [store, Failing()]
    cache = open_cache(settings(), stores=lambda _: stores.pop())
    with pytest.raises(CacheError, match="not today"):
        await cache.__aenter__()
    async with cache:
        assert (await cache.health()).ok


# The time budget

SLOW_CALLS = ["get", "lookup", "get_many", "set", "add", "increment", "delete_pattern", "clear", "statistics"]
LATE = r"^backend\.primary: no answer within 0\.03 s(; whether the request was done is not known)?$"


async def test_every_call_ends_within_the_timeout() -> None:
    store = SilentStore()
    async with open_cache(settings(timeout=0.03), stores=lambda _: store) as cache:
        for name in SLOW_CALLS:
            with pytest.raises(CacheTimeoutError, match=LATE) as caught:
                await EVERY_CALL[name](cache)
            assert (caught.value.timeout, caught.value.address) == (0.03, "backend.primary")
            assert caught.value.in_doubt is (name in ("set", "add", "increment")), (
                "only requests that cannot be repeated are in doubt"
            )
            assert isinstance(caught.value, TimeoutError)
        health = await cache.health()
        assert (health.ok, health.detail) == (False, "backend.primary: no answer within 0.03 s")
        store.release()
        assert await cache.get("key", "default") == "default"
        assert (await cache.health()).ok


def test_every_synchronous_call_ends_within_the_timeout() -> None:
    store = SilentStore()
    with open_sync_cache(settings(timeout=0.03), stores=lambda _: store) as cache:
        for name in SLOW_CALLS:
            with pytest.raises(CacheTimeoutError, match=LATE):
                run(EVERY_CALL[name](awaited(cache)))
        assert not cache.health().ok
        store.release()
        assert cache.get("key", "default") == "default"


async def test_a_call_given_up_on_is_not_worked_on_later() -> None:
    asked: list[Any] = []

    class Recording(SilentStore):
        async def execute(self, batch: Any) -> Any:
            asked.extend(batch)
            return await super().execute(batch)

    store = Recording()
    async with open_cache(settings(timeout=0.03), stores=lambda _: store) as cache:
        for key in ("in flight", "waiting"):
            with pytest.raises(CacheTimeoutError):
                await cache.get(key)
        store.release()
        await cache.get("next")
        assert [request.key for request in asked] == ["in flight", "next"]


# Fairness


async def nothing() -> None: ...


@pytest.mark.parametrize(
    "calling",
    [
        lambda cache: lambda: cache.get("key"),
        lambda cache: lambda: cache.lookup("key"),
        lambda cache: lambda: cache.get("missing"),
        lambda cache: lambda: cache.set("key", 1),
        lambda cache: lambda: cache.exists("key"),
        lambda cache: cache.cached(key="key")(nothing),
    ],
    ids=["get", "lookup", "miss", "set", "exists", "a decorated function"],
)
async def test_a_loop_of_calls_that_never_wait_lets_other_tasks_run(
    calling: Callable[[Cache], Callable[[], Awaitable[Any]]],
) -> None:
    others = 0

    async def other() -> None:
        nonlocal others
        others += 1

    async with a_cache() as cache, anyio.create_task_group() as tasks:
        await cache.set("key", 1)
        call = calling(cache)
        tasks.start_soon(other)
        for _ in range(3 * TURNS_PER_CHECKPOINT):  # Trio may continue this task first, once.
            await call()
        assert others == 1
