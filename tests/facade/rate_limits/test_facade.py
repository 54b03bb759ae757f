"""`rate_limit` of the facades: checks, blocks and a failing backend."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import anyio
import pytest

from cachebus import Cache, CacheClosed, CacheError, CapabilityError, RateLimit, RateLimited, open_cache
from cachebus.adapters.memory.store import MemoryStore
from cachebus.adapters.null import NullStore
from cachebus.messages import CacheConnectionError, CacheKeyError, RateLimitExceeded, RequestFailed, error_class

from ...clock import ManualClock
from ..faces import SilentStore, a_cache, a_sync_cache, heard, settings
from ..outages import Outage


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=[True, False], ids=["inline", "queued"])
async def cache(clock: ManualClock, request: pytest.FixtureRequest) -> AsyncIterator[Cache]:
    async with a_cache(clock=clock, inline=request.param) as cache:
        yield cache


async def test_a_check_says_whether_how_many_are_left_and_when_to_retry(cache: Cache, clock: ManualClock) -> None:
    limit = cache.rate_limit("api", 2, 10)
    assert await limit == RateLimit(True, 1, 0.0, 5.0)
    assert await limit.check() == RateLimit(True, 0, 0.0, 10.0)
    refused = await limit
    assert refused == RateLimit(False, 0, 5.0, 10.0)
    assert not refused
    clock.advance(5)
    assert await limit
    assert repr(limit) == "<AsyncRateLimiter 'api' 2 per 10 s, burst 2>"


async def test_a_block_is_entered_or_raises(cache: Cache) -> None:
    limit = cache.rate_limit("api", 1, timedelta(seconds=10))
    async with limit as entered:
        assert entered == RateLimit(True, 0, 0.0, 10.0)
    with pytest.raises(RateLimited, match="'api' is exhausted; try again in 10 s") as caught:
        async with limit:
            raise AssertionError("entered")
    assert (caught.value.key, caught.value.retry_after) == ("api", 10.0)
    assert error_class("rate_limited") is RateLimited
    assert isinstance(caught.value, CacheError)


async def test_what_a_block_raises_goes_out(cache: Cache) -> None:
    with pytest.raises(ZeroDivisionError):
        async with cache.rate_limit("api", 1, 10):
            _ = 1 / 0


async def test_burst_and_cost_count(cache: Cache) -> None:
    assert [(await cache.rate_limit("a", 1, 10, burst=3)).remaining for _ in range(3)] == [2, 1, 0]
    assert not await cache.rate_limit("a", 1, 10, burst=3)
    assert (await cache.rate_limit("b", 5, 10, cost=4)).remaining == 1
    assert (await cache.rate_limit("b", 5, 10, cost=2)).retry_after == 2.0


async def test_who_may_wait_waits_for_its_turn(cache: Cache, clock: ManualClock) -> None:
    limit = cache.rate_limit("api", 1, 10, wait=25)
    entered: list[tuple[int, float]] = []
    refused: list[float] = []

    async def enter(who: int) -> None:
        try:
            async with limit:
                entered.append((who, clock.monotonic()))
        except RateLimited as error:
            refused.append(error.retry_after)

    began = clock.monotonic()
    async with anyio.create_task_group() as tasks:
        for who in range(4):
            tasks.start_soon(enter, who)
            await anyio.wait_all_tasks_blocked()
        assert refused == [30.0], "the wait would exceed its limit"
        clock.advance(9.9)
        await anyio.wait_all_tasks_blocked()
        assert len(entered) == 1
        for pause in (0.1, 10.0):
            clock.advance(pause)
            await anyio.wait_all_tasks_blocked()
    assert entered == [(0, began), (1, began + 10), (2, began + 20)]


async def test_a_check_may_wait_too(cache: Cache, clock: ManualClock) -> None:
    await cache.rate_limit("api", 1, 10)
    replies: list[RateLimit] = []

    async def check() -> None:
        replies.append(await cache.rate_limit("api", 1, 10, wait=10))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(check)
        await anyio.wait_all_tasks_blocked()
        clock.advance(10)
    assert replies == [RateLimit(True, 0, 0.0, 10.0)]


async def test_limits_have_nothing_to_do_with_values(cache: Cache) -> None:
    await cache.set("api", "value")
    assert await cache.rate_limit("api", 1, 10)
    assert await cache.get("api") == "value"
    await cache.delete("api")
    await cache.clear()
    assert not await cache.rate_limit("api", 1, 10)
    assert [key async for key in cache.scan()] == []


async def test_who_is_refused_is_told_as_an_event(cache: Cache) -> None:
    with cache.events(RateLimitExceeded) as events:
        for _ in range(2):
            await cache.rate_limit("api", 2, 10, cost=2)
        (event,) = heard(events)
    assert isinstance(event, RateLimitExceeded)
    assert (event.key, event.cost, event.retry_after, event.backend) == ("api", 2, 10.0, "primary")


async def test_the_memory_of_a_limit_is_bounded_and_goes_by_itself(clock: ManualClock) -> None:
    store = MemoryStore(clock=clock, max_limits=5)
    async with open_cache(settings(), clock=clock, stores=lambda _: store) as cache:
        for at in range(50):
            assert await cache.rate_limit(f"a{at}", 1, 10)
        assert len(store._rate_limits) == 5
        for _ in range(3):
            await anyio.wait_all_tasks_blocked()
            clock.advance(5)
        await anyio.wait_all_tasks_blocked()
        assert len(store._rate_limits) == 0


BAD: list[tuple[Callable[[Any], Any], type[Exception], str]] = [
    (lambda c: c.rate_limit("", 1, 1), CacheKeyError, "empty"),
    (lambda c: c.rate_limit(7, 1, 1), CacheKeyError, "str"),
    (lambda c: c.rate_limit("\ud800", 1, 1), CacheKeyError, "Unicode"),
    (lambda c: c.rate_limit("a", 0, 1), ValueError, "limit"),
    (lambda c: c.rate_limit("a", -1, 1), ValueError, "limit"),
    (lambda c: c.rate_limit("a", float("nan"), 1), ValueError, "limit"),
    (lambda c: c.rate_limit("a", float("inf"), 1), ValueError, "limit"),
    (lambda c: c.rate_limit("a", 1.5, 1), ValueError, "limit"),
    (lambda c: c.rate_limit("a", 10**30, 1), ValueError, "limit"),
    (lambda c: c.rate_limit("a", True, 1), TypeError, "limit"),
    (lambda c: c.rate_limit("a", "3", 1), TypeError, "limit"),
    (lambda c: c.rate_limit("a", 1, 0), ValueError, "per"),
    (lambda c: c.rate_limit("a", 1, -1), ValueError, "per"),
    (lambda c: c.rate_limit("a", 1, float("nan")), ValueError, "per"),
    (lambda c: c.rate_limit("a", 1, 10**400), ValueError, "per"),
    (lambda c: c.rate_limit("a", 1, timedelta(0)), ValueError, "per"),
    (lambda c: c.rate_limit("a", 1, None), TypeError, "per"),
    (lambda c: c.rate_limit("a", 1, True), TypeError, "per"),
    (lambda c: c.rate_limit("a", 1, 1e9, burst=2), ValueError, "burst"),
    (lambda c: c.rate_limit("a", 1, 1, burst=0), ValueError, "burst"),
    (lambda c: c.rate_limit("a", 1, 1, cost=0), ValueError, "cost"),
    (lambda c: c.rate_limit("a", 1, 1, cost=2), ValueError, "cost must not exceed burst"),
    (lambda c: c.rate_limit("a", 3, 1, burst=1, cost=2), ValueError, "cost must not exceed burst"),
    (lambda c: c.rate_limit("a", 1, 1, wait=-1), ValueError, "wait"),
    (lambda c: c.rate_limit("a", 1, 1, wait=float("inf")), ValueError, "wait"),
    (lambda c: c.rate_limit("a", 1, 1, on_error="miss"), ValueError, "on_error"),
]


@pytest.mark.parametrize("at", range(len(BAD)))
def test_what_makes_no_sense_is_refused_at_once(at: int) -> None:
    call, kind, words = BAD[at]
    for cache in (a_cache(), a_sync_cache()):  # The caches are not open, so no request is sent.
        with pytest.raises(kind, match=words):
            call(cache)


def test_a_whole_float_will_do() -> None:
    with a_sync_cache() as cache:
        assert cache.rate_limit("a", 2.0, 10).check() == RateLimit(True, 1, 0.0, 5.0)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_a_closed_cache_says_so() -> None:
    cache = a_cache()
    limit = cache.rate_limit("a", 1, 1)
    with pytest.raises(CacheClosed):
        await limit
    async with cache:
        assert await limit
    with pytest.raises(CacheClosed):
        await limit


async def test_a_store_that_cannot_limit_rates_says_so_whatever_on_error_says() -> None:
    async with open_cache(settings(on_error="miss"), stores=lambda _: NullStore()) as cache:
        with pytest.raises(CapabilityError):
            await cache.rate_limit("a", 1, 1, on_error="allow")


# A failing backend


@pytest.mark.parametrize("of_cache", ["miss", "raise"])
async def test_a_backend_that_fails_is_an_error_unless_the_limit_says_otherwise(of_cache: Any) -> None:
    store = Outage()
    async with open_cache(settings(on_error=of_cache), stores=lambda _: store) as cache:
        assert await cache.rate_limit("a", 1, 10)
        store.error = CacheConnectionError("gone")
        with cache.events(RequestFailed) as events:
            with pytest.raises(CacheConnectionError):
                await cache.rate_limit("a", 1, 10)
            with pytest.raises(CacheConnectionError):
                async with cache.rate_limit("a", 1, 10):
                    raise AssertionError("entered")
            allowed = await cache.rate_limit("a", 1, 10, on_error="allow")
            assert allowed == RateLimit(True, 0, unchecked=True)
            async with cache.rate_limit("a", 1, 10, on_error="allow") as entered:
                assert entered.unchecked
            told = [(e.request, e.key, e.error, e.outcome) for e in heard(events) if isinstance(e, RequestFailed)]
        raised, admitted = (("rate.admit", "a", "connection", outcome) for outcome in ("raised", "admitted"))
        assert told == [raised, raised, admitted, admitted]
        store.error = None
        assert (await cache.statistics()).errors == 4
        assert (await cache.statistics()).dropped_writes == 0
        assert not await cache.rate_limit("a", 1, 10, on_error="allow"), "the backend must work again"


async def test_a_lost_answer_is_not_asked_for_again_and_says_that_nobody_knows() -> None:
    store = Outage()
    async with open_cache(settings(), stores=lambda _: store) as cache:
        store.lose_replies()
        with pytest.raises(CacheError) as caught:
            await cache.rate_limit("a", 2, 10)
        assert getattr(caught.value, "in_doubt", False)
        assert len(store.asked) == 1
        store.inner.lost_reply_rate = 0.0
        assert (await cache.rate_limit("a", 2, 10)).remaining == 0


async def test_a_check_ends_by_the_timeout_of_the_cache() -> None:
    store = SilentStore()
    async with open_cache(settings(timeout=0.05), stores=lambda _: store) as cache:
        assert (await cache.rate_limit("a", 2, 10, on_error="allow")).unchecked
        store.release()


# Without an event loop


def test_a_sync_cache_has_the_same() -> None:
    clock = ManualClock()
    with a_sync_cache(clock=clock) as cache:
        limit = cache.rate_limit("api", 2, 10)
        assert limit.check() == RateLimit(True, 1, 0.0, 5.0)
        with limit as entered:
            assert entered.remaining == 0
        assert limit.check() == RateLimit(False, 0, 5.0, 10.0)
        with pytest.raises(RateLimited), limit:
            raise AssertionError("entered")
        clock.advance(10)
        assert limit.check()
        assert repr(limit) == "<RateLimiter 'api' 2 per 10 s, burst 2>"


def test_threads_wait_for_their_turn_and_no_more_than_the_rate_go_on() -> None:
    went: list[float] = []
    with a_sync_cache() as cache:
        limit = cache.rate_limit("api", 100, 1, burst=5, wait=10)

        def work() -> None:
            for _ in range(5):
                with limit:
                    went.append(time.monotonic())

        threads = [threading.Thread(target=work) for _ in range(5)]
        began = time.monotonic()
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert len(went) == 25
    assert max(went) - began >= (25 - 5) / 100
