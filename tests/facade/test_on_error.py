"""`on_error`: misses or errors during an outage, on both facades."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from anyio import to_thread

from cachebus import (
    ActorFailed,
    Cache,
    CacheBackendError,
    CacheCapacityError,
    CacheClosed,
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    CacheInvalidationError,
    CacheKeyError,
    CacheTimeoutError,
    CapabilityError,
    CircuitOpen,
    Missing,
    NoSuchActor,
    Overloaded,
    WrongType,
    open_cache,
    open_sync_cache,
)
from cachebus.adapters.memory.store import MemoryStore
from cachebus.messages import CircuitOpened, RequestFailed

from ..clock import ManualClock
from .faces import awaited, heard
from .outages import Outage, down

Call = Callable[[Cache], Any]

URL = "redis://?retry_attempts=1&breaker_recovery=0.02&breaker_failure_threshold=1000"


@asynccontextmanager
async def a_cache(face: str, store: Outage, url: str = URL, **options: Any) -> AsyncIterator[Cache]:
    """Open a cache over `store`, asynchronous or synchronous."""
    if face == "async":
        async with open_cache(url, stores=lambda _: store, **options) as cache:
            yield cache
    else:
        with open_sync_cache(url, stores=lambda _: store, **options) as cache:
            yield awaited(cache)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def count_up(cache: Cache) -> Any:
    return cache.increment("n")


async def keys(cache: Cache) -> list[str]:
    return [key async for key in cache.scan()]


READS: dict[str, tuple[Call, Any]] = {
    "get": (lambda cache: cache.get("k", "default"), "default"),
    "get_many": (lambda cache: cache.get_many(["k", "l"]), {}),
    "exists": (lambda cache: cache.exists("k"), False),
    "ttl": (lambda cache: cache.ttl("k"), 0.0),
    "scan": (keys, []),
}
WRITES: dict[str, tuple[Call, Any]] = {
    "set": (lambda cache: cache.set("k", 2), False),
    "set_many": (lambda cache: cache.set_many({"k": 2}), None),
    "add": (lambda cache: cache.add("other", 2), False),
    "compare_and_set": (lambda cache: cache.compare_and_set("k", 2, version=1.0), False),
    "touch": (lambda cache: cache.touch("k", ttl=5), False),
}
INVALIDATIONS: dict[str, Call] = {
    "delete": lambda cache: cache.delete("k"),
    "delete_many": lambda cache: cache.delete_many(["k"]),
    "delete_pattern": lambda cache: cache.delete_pattern("*"),
    "invalidate_tags": lambda cache: cache.invalidate_tags("t"),
    "clear": lambda cache: cache.clear(),
}
FAILURES = [
    CacheConnectionError("gone"),
    CacheBackendError("out of memory"),
    CacheTimeoutError("no answer"),
    CircuitOpen("open"),
    Overloaded("full"),
    ActorFailed("crashed"),
    NoSuchActor("nobody"),
]
FAULTS = [
    CacheKeyError("bad"),
    CacheConfigurationError("wrong password"),
    CapabilityError("cannot"),
    WrongType("no int"),
    CacheCapacityError("too large"),
    CacheClosed("closed"),
]


async def both(work: Callable[[Cache, Outage], Any], **options: Any) -> None:
    """Run `work` with each facade over a separate store. The synchronous one runs in a thread."""
    async with a_cache("async", store := Outage(), **options) as cache:
        await work(cache, store)

    def in_a_thread() -> None:
        async def run() -> None:
            async with a_cache("sync", store := Outage(), **options) as cache:
                await work(cache, store)

        try:
            run().send(None)
        except StopIteration:
            return
        raise AssertionError("a synchronous cache must not suspend")

    await to_thread.run_sync(in_a_thread)


@pytest.mark.parametrize("name", READS)
async def test_a_read_that_the_backend_fails_is_a_miss(name: str) -> None:
    call, substitute = READS[name]

    async def work(cache: Cache, store: Outage) -> None:
        await cache.set("k", 1)
        store.error = down()
        assert await call(cache) == substitute
        assert isinstance(await cache.lookup("k"), Missing)
        store.error = None
        assert await call(cache) != substitute, "the values must be there when the backend is back"
        snapshot = await cache.statistics()
        assert (snapshot.errors, snapshot.dropped_writes) == (2, 0)

    await both(work)


@pytest.mark.parametrize("name", WRITES)
async def test_a_write_that_the_backend_fails_is_dropped_and_counted(name: str) -> None:
    call, substitute = WRITES[name]

    async def work(cache: Cache, store: Outage) -> None:
        await cache.set("k", 1, ttl=1000)
        store.error = down()
        assert await call(cache) == substitute
        store.error = None
        assert await cache.get("k") == 1, "the dropped write must not change the value"
        snapshot = await cache.statistics()
        assert (snapshot.errors, snapshot.dropped_writes) == (1, 1)

    await both(work)


@pytest.mark.parametrize("name", INVALIDATIONS)
async def test_an_invalidation_that_the_backend_fails_is_never_lost_in_silence(name: str) -> None:
    async def work(cache: Cache, store: Outage) -> None:
        store.error = down()
        with pytest.raises(CacheInvalidationError, match=f"^{name} may not have taken effect.*nobody is") as caught:
            await INVALIDATIONS[name](cache)
        assert isinstance(caught.value.__cause__, CacheConnectionError)
        assert (await cache.statistics()).errors == 1

    await both(work)


async def test_a_sum_that_nobody_knows_is_not_made_up() -> None:
    async def work(cache: Cache, store: Outage) -> None:
        store.error = down()
        with pytest.raises(CacheConnectionError, match="nobody is there"):
            await count_up(cache)

    await both(work)


@pytest.mark.parametrize("name", [*READS, *WRITES, *INVALIDATIONS, "increment"])
async def test_with_raise_every_failure_goes_out_as_it_is(name: str) -> None:
    calls: dict[str, Call] = {**{name: call for name, (call, _) in (READS | WRITES).items()}, **INVALIDATIONS}

    async def work(cache: Cache, store: Outage) -> None:
        store.error = down()
        with pytest.raises(CacheConnectionError, match="nobody is there"):
            await (calls | {"increment": count_up})[name](cache)
        snapshot = await cache.statistics()
        assert (snapshot.errors, snapshot.dropped_writes) == (1, 0)

    await both(partial(work), on_error="raise")


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
async def test_what_the_backend_does_wrong_is_a_miss(error: CacheError) -> None:
    async def work(cache: Cache, store: Outage) -> None:
        store.error = error
        assert await cache.get("k", "default") == "default"
        assert await cache.set("k", 1) is False

    await both(work)


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
async def test_what_the_program_does_wrong_is_always_an_error(error: CacheError) -> None:
    async def work(cache: Cache, store: Outage) -> None:
        store.error = error
        for call in (lambda: cache.get("k"), lambda: cache.set("k", 1), cache.clear):
            with pytest.raises(type(error)):
                await call()
        assert (await cache.statistics()).errors == 0

    await both(work)


async def test_a_lost_answer_to_what_may_not_be_done_twice_says_that_nobody_knows() -> None:
    async def work(cache: Cache, store: Outage) -> None:
        store.lose_replies()
        for call in (count_up, lambda cache: cache.add("k", 1)):
            with pytest.raises(CacheTimeoutError, match=r"whether the request was done is not known$") as caught:
                await call(cache)
            assert caught.value.in_doubt
        assert [len(batch) for batch in store.asked] == [1, 1], "the request must not be repeated"

    await both(work, url="redis://?retry_attempts=5", on_error="raise")


async def test_a_failure_is_told_to_whoever_listens() -> None:
    async with a_cache("async", store := Outage()) as cache:
        store.error = down()
        with cache.events(RequestFailed) as events:
            await cache.get("a")
            await cache.set("b", 1)
            with pytest.raises(CacheInvalidationError):
                await cache.clear()
        told = [
            (each.request, each.error, each.outcome, each.key)
            for each in heard(events)
            if isinstance(each, RequestFailed)
        ]
    assert told == [
        ("backend.get", "connection", "missed", "a"),
        ("backend.set", "connection", "dropped", "b"),
        ("backend.clear", "connection", "raised", ""),
    ]


async def test_the_environment_and_the_keyword_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Outage()
    store.error = down()
    monkeypatch.setenv("CACHEBUS_ON_ERROR", "raise")
    with pytest.raises(CacheConnectionError):
        async with a_cache("async", store):
            pass
    async with a_cache("async", store, on_error="miss") as cache:
        assert await cache.get("k", "default") == "default"
    with pytest.raises(CacheConfigurationError, match=r"^on_error: expected 'miss' or 'raise', not 'ignore'$"):
        open_cache("memory://", on_error="ignore")


# Decorated functions


async def test_a_decorated_function_runs_when_the_cache_fails_and_at_the_price_that_the_circuit_sets() -> None:
    async with a_cache("async", store := Outage(), "redis://?breaker_failure_threshold=3&retry_attempts=1") as cache:
        store.error = down()
        calls: list[int] = []

        @cache.cached(key="square:{n}")
        async def square(n: int) -> int:
            calls.append(n)
            return n * n

        assert [await square(number) for number in range(100)] == [number**2 for number in range(100)]
        assert len(calls) == 100
        assert len(store.asked) == 3, "the circuit must open, so that the server gets no more requests"


def test_a_plain_decorated_function_runs_when_the_cache_fails() -> None:
    store = Outage()
    with open_sync_cache("redis://?breaker_failure_threshold=3&retry_attempts=1", stores=lambda _: store) as cache:

        @cache.cached(key="square:{n}")
        def square(n: int) -> int:
            return n * n

        assert square(3) == 9
        store.error = down()
        assert [square(number) for number in range(100)] == [number**2 for number in range(100)]
        assert len(store.asked) <= 6


async def test_with_raise_a_decorated_function_is_not_run_when_the_cache_fails() -> None:
    async with a_cache("async", store := Outage(), on_error="raise") as cache:

        @cache.cached(key="k")
        async def never() -> int:
            raise AssertionError("it ran")

        store.error = down()
        with pytest.raises(CacheConnectionError):
            await never()


def test_with_raise_a_plain_decorated_function_is_not_run_when_the_cache_fails() -> None:
    store = Outage()
    with open_sync_cache(URL, stores=lambda _: store, on_error="raise") as cache:

        @cache.cached(key="k")
        def never() -> int:
            raise AssertionError("it ran")

        store.error = down()
        with pytest.raises(CacheConnectionError):
            never()


# Opening while the server is down


async def test_a_cache_opens_while_its_server_is_down_and_heals_by_itself() -> None:
    async def work(cache: Cache, store: Outage) -> None:
        assert store.opens == 1
        assert await cache.get("k", "default") == "default"
        assert not (await cache.health()).ok
        store.error = None
        assert await cache.set("k", 1)
        assert await cache.get("k") == 1
        opens = store.opens
        assert await cache.get("k") == 1
        assert store.opens == opens, "the store must not be opened again"
        assert (await cache.health()).ok

    store = Outage()
    store.error = down()
    async with a_cache("async", store) as cache:
        await work(cache, store)


async def test_with_raise_a_cache_does_not_open_while_its_server_is_down() -> None:
    store = Outage()
    store.error = down()
    with pytest.raises(CacheConnectionError, match="nobody is there"):
        async with open_cache(URL, stores=lambda _: store, on_error="raise"):
            raise AssertionError("it opened")


async def test_what_patience_does_not_mend_keeps_a_cache_from_opening() -> None:
    store = Outage()
    store.error = CacheConfigurationError("wrong password")
    with pytest.raises(CacheConfigurationError, match="wrong password"):
        async with open_cache(URL, stores=lambda _: store):
            raise AssertionError("it opened")


async def test_an_outage_does_not_use_up_the_restarts_of_an_actor() -> None:
    store = Outage()
    async with open_cache(URL, stores=lambda _: store, on_error="raise", actors={"max_restarts": 1}) as cache:

        def crashes(request: Any) -> CacheError | None:
            store.fails = lambda request: None
            store.error = down()
            raise ZeroDivisionError

        store.fails = crashes
        with pytest.raises(ActorFailed):
            await cache.increment("n")
        for _ in range(5):
            with pytest.raises(CacheConnectionError):
                await cache.increment("n")
        store.error = None
        assert await cache.increment("n") == 1


# Statistics and health


async def test_health_says_what_is_wrong_and_where_the_circuit_stands() -> None:
    async def work(cache: Cache, store: Outage) -> None:
        assert (await cache.health()).circuit == "closed"
        store.error = down()
        first, second = await cache.health(), await cache.health()
        assert (first.ok, first.detail) == (False, "backend 'outage': nobody is there")
        assert first.circuit == "open"
        assert second.detail.startswith("the circuit of backend.primary is open; next attempt in ")
        assert (await cache.statistics()).errors == 0, "`health` must not count as a call"

    await both(work, url="redis://?breaker_failure_threshold=1&retry_attempts=1")


async def test_the_statistics_say_how_the_guard_has_fared() -> None:
    clock = ManualClock()
    store = Outage()
    url = "redis://?breaker_failure_threshold=2&retry_attempts=1&breaker_recovery=20"
    async with open_cache(url, stores=lambda _: store, clock=clock) as cache:
        await cache.get("k")
        store.error = down()
        for _ in range(4):
            await cache.get("k")
        guard = (await cache.statistics()).guard
    assert (guard["state"], guard["failure_count"], guard["success_count"]) == ("open", 2, 1)
    assert (guard["last_failure_time"], guard["next_attempt"]) == (clock.wall(), clock.wall() + 20.0)
    assert (guard["current_timeout"], guard["p95"], guard["in_flight"], guard["rejected"]) == (0.1, 0.0, 0, 2)


async def test_a_store_without_a_guard_has_no_circuit() -> None:
    async with open_cache("memory://", stores=lambda _: MemoryStore()) as cache:
        assert (await cache.health()).circuit == ""
        assert (await cache.statistics()).guard == {}


async def test_an_opening_circuit_is_told_through_the_facade() -> None:
    async with a_cache("async", store := Outage(), "redis://?breaker_failure_threshold=2&retry_attempts=1") as cache:
        store.error = down()
        with cache.events(CircuitOpened) as events:
            for _ in range(3):
                await cache.get("k")
        (opened,) = heard(events)
        assert isinstance(opened, CircuitOpened)
        assert (opened.address, opened.failures, opened.retry_after) == ("backend.primary", 2, 30.0)
