"""A loader of another process fails between two lease requests: its waiters get the error and do not load."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from cachebus import open_cache
from cachebus.adapters.redis.pubsub import LeaseWatch
from cachebus.loading.lease_follower import LeaseFollower
from cachebus.messages import Failed, LoaderFailed, Loading, WatchLease
from cachebus.testing.servers import Server, redis_server

from .slow import Slow

__all__ = ["redis_server"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_who_waited_for_it_does_not_load(redis_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = LeaseWatch.watch
    too_late: list[Failed] = []

    def deaf_once(self: LeaseWatch, request: WatchLease, answer: Any) -> None:
        """Reports that the wait limit has passed at the moment the loader fails."""

        def heard(reply: Any) -> None:
            if isinstance(reply, Failed):
                too_late.append(reply)
                answer(Loading(request.token))
            else:
                wait(heard)

        def wait(answer: Any) -> None:
            watch(self, WatchLease(request.key, request.token, 30.0), answer)

        if too_late:
            watch(self, request, answer)
        else:
            wait(heard)

    monkeypatch.setattr(LeaseWatch, "watch", deaf_once)
    load, mine = Slow(OSError("the source is away")), Slow("mine")
    mine.go_on.set()
    namespace = uuid4().hex
    async with (
        open_cache(redis_server.url, namespace=namespace) as other,
        open_cache(redis_server.url, namespace=namespace) as cache,
    ):
        loading = asyncio.create_task(other.get_or_load("k", load))
        await load.begun.wait()
        waiting = [asyncio.create_task(cache.get_or_load("k", mine)) for _ in range(10)]
        await asyncio.sleep(0.3)
        load.go_on.set()
        with pytest.raises(OSError, match="away"):
            await loading
        for each in waiting:
            with pytest.raises(LoaderFailed):
                await each
        assert too_late
        assert mine.calls == 0
        async with asyncio.timeout(5):
            assert await cache.get_or_load("k", mine) == "mine", "the next may try at once"


async def test_a_lease_that_was_granted_when_everybody_had_gone_is_given_back(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking = asyncio.Event()

    async def never(*arguments: Any) -> None:
        looking.set()
        await asyncio.Event().wait()

    load, mine = Slow(), Slow("mine")
    mine.go_on.set()
    namespace = uuid4().hex
    async with (
        open_cache(redis_server.url, namespace=namespace) as other,
        open_cache(redis_server.url, namespace=namespace) as cache,
    ):
        monkeypatch.setattr(LeaseFollower, "_failure_of", never)
        loading = asyncio.create_task(other.get_or_load("k", load, lease_ttl=60))
        await load.begun.wait()
        waiting = [asyncio.create_task(cache.get_or_load("k", mine, lease_ttl=60)) for _ in range(10)]
        await asyncio.sleep(0.3)
        loading.cancel()
        async with asyncio.timeout(30):
            await looking.wait()
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        async with asyncio.timeout(10):
            assert await other.get_or_load("k", mine) == "mine"
        assert not cache.loads.table.in_flight
