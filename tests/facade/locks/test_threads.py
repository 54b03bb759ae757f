"""Locks of threads, without an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

import cachebus.settings  # noqa: F401 (which blocks, as an import does, if a test is the first to open a cache)
from cachebus import CacheError, open_sync_cache
from cachebus.messages import (
    LockNotAcquired,
    LockNotHeld,
)


def test_threads_have_it_one_by_one() -> None:
    with open_sync_cache("memory://") as cache:
        inside, tokens = 0, list[int]()

        def work() -> None:
            nonlocal inside
            for _ in range(10):
                with cache.lock("a", wait=30) as lock:
                    inside += 1
                    assert inside == 1
                    tokens.append(lock.token)
                    inside -= 1

        threads = [threading.Thread(target=work) for _ in range(20)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert tokens == sorted(set(tokens))
        assert len(tokens) == 200


def test_a_lock_without_an_event_loop_has_everything_that_one_with_it_has() -> None:
    with open_sync_cache("memory://") as cache:
        lock = cache.lock("a", owner="me", ttl=20)
        assert (lock.name, lock.owner, lock.ttl) == ("a", "me", 20)
        assert lock.info() is None
        with lock as same:
            assert same is lock
            assert lock.held
            assert not lock.lost
            assert repr(lock).startswith("<SyncLock 'a' held, token ")
            info = lock.info()
            assert info is not None
            assert info.token == lock.token
            lock.extend(40)
            assert 39 < lock.remaining <= 40
            lock.check()
            with pytest.raises(LockNotAcquired):
                cache.lock("a", wait=0).acquire()
        assert not lock.is_locked()
        with pytest.raises(LockNotHeld):
            lock.release()
        assert cache.lock("a").acquire().held


def test_a_lock_is_renewed_whatever_its_thread_does() -> None:
    with open_sync_cache("memory://") as cache, cache.lock("a", ttl=0.3) as lock:
        time.sleep(1)
        assert lock.held
        with pytest.raises(LockNotAcquired):
            cache.lock("a", wait=0).acquire()


def test_a_thread_waits_for_another() -> None:
    with open_sync_cache("memory://") as cache:
        lock = cache.lock("a").acquire()
        had: list[int] = []
        thread = threading.Thread(target=lambda: had.append(cache.lock("a", wait=30).acquire().token))
        thread.start()
        assert not had
        lock.release()
        thread.join(30)
        assert had[0] > lock.token


def test_no_thread_of_an_event_loop_is_stopped_for_a_lock() -> None:
    with open_sync_cache("memory://") as cache, cache.lock("a"):

        async def wait() -> None:
            with pytest.raises(CacheError, match="await an asynchronous cache"):
                cache.lock("a", wait=5).acquire()
            with pytest.raises(LockNotAcquired):
                cache.lock("a", wait=0).acquire()

        asyncio.run(wait())
    with open_sync_cache("memory://") as cache:
        asyncio.run(_try(cache))


async def _try(cache: Any) -> None:
    with cache.lock("a", wait=0):
        pass
