"""Locks of the facades."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import anyio
import pytest

import cachebus.settings  # noqa: F401 (which blocks, as an import does, if a test is the first to open a cache)
from cachebus import Cache, CacheClosed, CacheError, CacheKeyError, CapabilityError, open_cache
from cachebus.client.renewals import PER_LEASE
from cachebus.facade.locks import Lock
from cachebus.messages import (
    CacheTimeoutError,
    LockAcquired,
    LockNotAcquired,
    LockNotHeld,
    LockReleased,
    ReleaseLock,
    RenewLock,
)

from ...clock import ManualClock

pytestmark = pytest.mark.anyio


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    async with open_cache("memory://") as made:
        yield made


def steal(lock: Lock) -> ReleaseLock:
    """Return a request that takes a lock from its holder, like a store that loses it."""
    return ReleaseLock(lock.name, lock._ticket)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"ttl": 0}, ValueError, "ttl"),
        ({"ttl": -1.5}, ValueError, "ttl"),
        ({"ttl": math.nan}, ValueError, "ttl"),
        ({"ttl": math.inf}, ValueError, "ttl"),
        ({"ttl": 10**400}, ValueError, "ttl"),
        ({"ttl": timedelta(0)}, ValueError, "ttl"),
        ({"ttl": "5"}, TypeError, "ttl"),
        ({"ttl": True}, TypeError, "ttl"),
        ({"ttl": None}, TypeError, "ttl"),
        ({"wait": -1}, ValueError, "wait"),
        ({"wait": math.nan}, ValueError, "wait"),
        ({"wait": math.inf}, ValueError, "wait"),
        ({"wait": "no"}, TypeError, "wait"),
        ({"owner": ""}, ValueError, "owner"),
        ({"owner": "\ud800"}, ValueError, "owner"),
        ({"owner": 5}, TypeError, "owner"),
        ({"name": ""}, CacheKeyError, "empty"),
        ({"name": 5}, CacheKeyError, "str"),
        ({"name": "\ud800"}, CacheKeyError, "Unicode"),
    ],
)
async def test_what_cannot_be_is_refused_at_once(
    cache: Cache, options: dict[str, Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        cache.lock(**{"name": "a", **options})


async def test_a_lock_is_had_and_given_back(cache: Cache) -> None:
    lock = cache.lock("a", ttl=timedelta(seconds=20), owner="me")
    assert (lock.name, lock.owner, lock.ttl, lock.wait) == ("a", "me", 20.0, 5.0)
    assert "not held" in repr(lock)
    with pytest.raises(LockNotHeld):
        _ = lock.token
    with pytest.raises(LockNotHeld):
        lock.check()
    for _ in range(2):
        async with lock as same:
            assert same is lock
            assert lock.held
            assert not lock.lost
            assert 19 < lock.remaining <= 20
            assert await lock.is_locked()
            lock.check()
        assert not lock.held
        assert not lock.lost
        assert lock.remaining == 0
        assert not await lock.is_locked()
    assert lock.token > 0


async def test_one_object_holds_one_lock(cache: Cache) -> None:
    lock = cache.lock("a")
    async with lock:
        with pytest.raises(CacheError, match="already"):
            await lock.acquire()
        assert lock.held
        waiting = cache.lock("a", wait=60)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(waiting.acquire)
            await anyio.wait_all_tasks_blocked()
            assert not waiting.held
            assert not waiting.lost
            with pytest.raises(CacheError, match="is waiting for it"):
                await waiting.acquire()
            tasks.cancel_scope.cancel()


async def test_who_cannot_have_it_is_told_why(cache: Cache) -> None:
    async with cache.lock("a", owner="me"):
        for wait in (0, 0.05):
            with pytest.raises(
                LockNotAcquired, match=r"could not acquire the lock 'a' within .* s: 'me' holds it"
            ) as refused:
                async with cache.lock("a", wait=wait):
                    raise AssertionError("two callers hold the lock")
            assert isinstance(refused.value, CacheTimeoutError)
            assert isinstance(refused.value, TimeoutError)
            assert (refused.value.name, refused.value.owner) == ("a", "me")
            assert refused.value.timeout == wait


async def test_who_says_nothing_waits_as_long_as_a_call_may_take() -> None:
    async with open_cache("memory://", timeout=0.1) as cache, cache.lock("a"):
        began = time.monotonic()
        with pytest.raises(LockNotAcquired):
            await cache.lock("a").acquire()
        assert time.monotonic() - began < 3


async def test_the_error_of_the_body_comes_out_and_the_lock_is_free(cache: Cache) -> None:
    with pytest.raises(KeyError):
        async with cache.lock("a"):
            raise KeyError("mine")

    async def body() -> None:
        async with cache.lock("a") as lock:
            await cache.client.locks.ask(steal(lock))
            raise KeyError("mine")

    with pytest.raises(KeyError) as failed:
        await body()
    assert any("could not be released" in note for note in failed.value.__notes__)
    async with cache.lock("a", wait=0):
        pass


async def test_a_cancelled_body_gives_the_lock_back(cache: Cache) -> None:
    async with anyio.create_task_group() as tasks:

        async def hold() -> None:
            async with cache.lock("a"):
                await anyio.sleep_forever()

        tasks.start_soon(hold)
        await anyio.wait_all_tasks_blocked()
        assert await cache.lock("a").is_locked()
        tasks.cancel_scope.cancel()
    async with cache.lock("a", wait=1):
        pass


async def test_a_body_may_give_it_back_itself(cache: Cache) -> None:
    async with cache.lock("a") as lock:
        await lock.release()
        async with cache.lock("a", wait=0):
            pass


async def test_leaving_a_lock_that_was_lost_raises(cache: Cache) -> None:
    async def body() -> None:
        async with cache.lock("a") as lock:
            await cache.client.locks.ask(steal(lock))
            with pytest.raises(LockNotHeld):
                await lock.extend()
            assert lock.lost
            assert not lock.held
            assert "lost" in repr(lock)

    with pytest.raises(LockNotHeld):
        await body()


async def renewals(clock: ManualClock, cache: Cache, *, renew: bool, seconds: float) -> Lock:
    lock = await cache.lock("a", ttl=3, renew=renew).acquire()
    for _ in range(int(seconds * 4)):
        clock.advance(0.25)
        await anyio.wait_all_tasks_blocked()
    return lock


async def test_a_lock_is_renewed_by_itself_unless_told_otherwise() -> None:
    clock = ManualClock()
    async with open_cache("memory://", clock=clock) as cache:
        lock = await renewals(clock, cache, renew=True, seconds=5)
        assert lock.held
        assert lock.remaining >= 3 - 3 / PER_LEASE - 0.25
        await lock.release()
        lock = await renewals(clock, cache, renew=False, seconds=5)
        assert lock.lost
        with pytest.raises(LockNotHeld):
            await lock.release()


async def test_a_lock_that_its_store_lost_is_seen_to_be_lost_at_the_next_renewal() -> None:
    clock = ManualClock()
    async with open_cache("memory://", clock=clock) as cache:
        lock = await cache.lock("a", ttl=300).acquire()
        await cache.client.locks.ask(steal(lock))
        assert not lock.lost
        clock.advance(101)
        with anyio.fail_after(30):
            while not lock.lost:
                await anyio.wait_all_tasks_blocked()
        with pytest.raises(LockNotHeld):
            lock.check()


async def test_a_renewal_that_fails_is_tried_again_before_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_cache("memory://") as cache:
        way, failures = cache.client.locks, 2
        ask = way.ask

        async def failing(request: Any, patience: float = 0.0) -> Any:
            nonlocal failures
            if isinstance(request, RenewLock) and failures:
                failures -= 1
                raise CacheTimeoutError("no answer", "locks", 1.0)
            return await ask(request, patience)

        monkeypatch.setattr(way, "ask", failing)
        lock = await cache.lock("a", ttl=1).acquire()
        await anyio.sleep(1.3)
        assert failures == 0
        assert lock.held


async def test_what_is_extended_is_renewed_for_as_long(cache: Cache) -> None:
    async with cache.lock("a", ttl=5) as lock:
        await lock.extend(timedelta(seconds=50))
        assert lock.ttl == 50
        assert lock.remaining > 49
        await lock.extend()
        assert lock.remaining > 49
        with pytest.raises(ValueError, match="ttl"):
            await lock.extend(0)


async def test_a_renewal_under_way_grants_no_longer_time_that_is_asked_for_meanwhile(cache: Cache) -> None:
    lock = await cache.lock("a", ttl=5, renew=False).acquire()
    ask, gate = lock._ask, anyio.Event()
    asked: list[float] = []

    async def slow(request: Any) -> Any:
        if not isinstance(request, RenewLock):
            return await ask(request)
        asked.append(request.ttl)
        if len(asked) > 1:
            raise CacheTimeoutError("no answer", "locks", 1.0)  # The extension fails.
        reply = await ask(request)
        await gate.wait()
        return reply

    lock._ask = slow
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lock.extend)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(CacheTimeoutError):
            await lock.extend(100)
        gate.set()
    assert asked == [5, 100]
    assert lock.remaining <= 5


async def test_a_grant_that_comes_late_is_renewed_before_it_is_relied_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    async with open_cache("memory://", clock=clock) as cache:
        way, asked = cache.client.locks, list[type[Any]]()
        ask = way.ask

        async def slow(request: Any, patience: float = 0.0) -> Any:
            asked.append(type(request))
            reply = await ask(request, patience)
            if len(asked) == 1:
                clock.advance(2)  # As if this process had been paused.
            return reply

        monkeypatch.setattr(way, "ask", slow)
        lock = await cache.lock("a", ttl=4, renew=False).acquire()
        assert asked[1] is RenewLock
        assert lock.remaining == pytest.approx(4)
        await lock.release()
        asked.clear()
        with pytest.raises(LockNotAcquired):
            await cache.lock("a", ttl=1).acquire()
        assert asked[1] is RenewLock


async def test_a_lock_whose_time_is_shorter_than_the_way_to_it_is_not_had() -> None:
    async with open_cache("memory://") as cache:
        with pytest.raises(LockNotAcquired):
            await cache.lock("a", ttl=1e-7, renew=False).acquire()
        assert (await cache.lock("a", wait=0).acquire()).held


async def test_what_happens_to_locks_is_told(cache: Cache) -> None:
    with cache.events("lock_*") as events:
        async with cache.lock("a", owner="me") as lock:
            pass
        told = [await anext(events), await anext(events)]
    assert [type(each) for each in told] == [LockAcquired, LockReleased]
    assert all((each.key, each.owner, each.token) == ("a", "me", lock.token) for each in told)  # type: ignore[attr-defined]


async def test_a_closed_cache_gives_no_locks() -> None:
    async with open_cache("memory://") as cache:
        lock = await cache.lock("a").acquire()
    with pytest.raises(CacheClosed):
        cache.lock("a")
    with pytest.raises(CacheClosed):
        await lock.release()


async def test_a_store_without_locks_says_so() -> None:
    async with open_cache("null://") as cache:
        with pytest.raises(CapabilityError, match="locks='redis://host'"):
            await cache.lock("a").acquire()
    async with open_cache("null://", locks="memory://") as cache, cache.lock("a"):
        assert cache.client.locks.address == "locks"


async def test_200_contenders_in_one_process_have_it_one_by_one(cache: Cache) -> None:
    inside, order = 0, list[int]()

    async def work(number: int) -> None:
        nonlocal inside
        async with cache.lock("a", wait=30) as lock:
            inside += 1
            assert inside == 1
            order.append(lock.token)
            await anyio.lowlevel.checkpoint()
            inside -= 1

    async with anyio.create_task_group() as tasks:
        for number in range(200):
            tasks.start_soon(work, number)
    assert order == sorted(set(order))
    assert len(order) == 200
