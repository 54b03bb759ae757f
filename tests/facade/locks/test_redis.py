"""Locks over a real Redis: several caches and processes, and their failures."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

import cachebus.settings  # noqa: F401 (which blocks, as an import does, if a test is the first to open a cache)
from cachebus import Cache, CacheError, open_cache
from cachebus.adapters.redis.locks import CLAIM_MS
from cachebus.messages import (
    AcquireLock,
    CacheBackendError,
    CircuitOpen,
    LockDenied,
    LockExpired,
    LockNotAcquired,
    LockNotHeld,
    ReleaseLock,
)
from cachebus.testing.servers import Server, redis_command, run_redis

from ...house.paths import ROOT
from ...lateness import within
from .fleet import Resource, check_journal, fleet, token_of

pytestmark = pytest.mark.anyio

QUIET = "health_check_interval=60"
CLAIM = CLAIM_MS / 1000


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server() -> Iterator[Server]:
    with run_redis() as running:
        yield running


async def tell(server: Server, *words: str) -> bytes:
    return await anyio.to_thread.run_sync(lambda: redis_command(server, *words))


@asynccontextmanager
async def cache_at(server: Server, query: str = QUIET, **options: Any) -> AsyncGenerator[Cache]:
    async with open_cache(f"{server.url}?{query}", namespace="fleet", **options) as cache:
        yield cache


@pytest.fixture
async def cache(server: Server) -> AsyncIterator[Cache]:
    async with cache_at(server) as made:
        yield made


async def queued(server: Server, count: int, name: str = "a") -> None:
    """Return when `count` callers wait in the server."""
    with anyio.fail_after(30):
        while int((await tell(server, "ZCARD", f"fleet#lock:{{{name}}}:queue")).strip(b":\r\n")) != count:
            await asyncio.sleep(0.005)


async def calls(server: Server) -> dict[str, int]:
    """Return the number of calls of each command, without the calls of scripts."""
    lines = (await tell(server, "INFO", "commandstats")).decode().split("\r\n")
    found = {
        line.split(":")[0].removeprefix("cmdstat_"): int(line.split("calls=")[1].split(",")[0])
        for line in lines
        if "calls=" in line
    }
    return {name: count for name, count in found.items() if name in ("eval", "evalsha", "get", "set", "exists", "ping")}


async def test_uncontended_it_costs_one_round_trip_to_have_and_one_to_give_back(server: Server, cache: Cache) -> None:
    async with cache.lock("warm"):
        pass
    before = await calls(server)
    for n in range(50):
        async with cache.lock(f"n{n}"):
            pass
    after = await calls(server)
    assert after["evalsha"] - before["evalsha"] == 100
    assert {k: v for k, v in after.items() if k != "evalsha" and k != "exists"} == {
        k: v for k, v in before.items() if k != "evalsha" and k != "exists"
    }


async def test_nobody_asks_while_200_wait(server: Server, cache: Cache) -> None:
    async with cache_at(server) as other:
        order: list[int] = []

        async def work(number: int) -> None:
            async with (cache, other)[number % 2].lock("a", wait=60):
                order.append(number)

        async with asyncio.TaskGroup() as tasks, cache.lock("a", ttl=60):
            for number in range(200):
                tasks.create_task(work(number))
            await queued(server, 200)
            await asyncio.sleep(0.3)  # Both processes have subscribed to their inboxes by now.
            before = await calls(server)
            await asyncio.sleep(2)
            assert await calls(server) == before
        assert sorted(order) == list(range(200))
        assert [n for n in order if n % 2 == 0] == list(range(0, 200, 2))
        assert [n for n in order if n % 2] == list(range(1, 200, 2))


async def test_first_come_is_first_served_across_caches(server: Server, cache: Cache) -> None:
    async with cache_at(server) as other:
        order: list[int] = []

        async def work(number: int) -> None:
            async with (cache, other, other)[number % 3].lock("a", wait=60):
                order.append(number)

        async with asyncio.TaskGroup() as tasks, cache.lock("a"):
            for number in range(12):
                tasks.create_task(work(number))
                await queued(server, number + 1)
            await asyncio.sleep(0.3)
        assert order == list(range(12))


async def test_an_offer_that_is_heard_late_takes_the_lock_from_nobody(server: Server, cache: Cache) -> None:
    async with cache.lock("other"):
        waiting = asyncio.create_task(cache.lock("other", wait=30).acquire())
        await queued(server, 1, "other")  # From now on, this process is subscribed to its inbox.
    await (await waiting).release()
    async with cache.lock("a", ttl=30) as lock:
        inbox = (await tell(server, "HGET", "fleet#lock:{a}", "i")).split(b"\r\n")[1].decode()
        offer = ("PUBLISH", f"fleet#lock:to:{inbox}", f"{lock._ticket}|a")
        with anyio.fail_after(30):
            while await tell(server, *offer) != b":1\r\n":
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await lock.extend(30)


@pytest.mark.parametrize("count", [2, 4])
async def test_200_contenders_in_several_processes_never_overlap(server: Server, tmp_path: Path, count: int) -> None:
    journal = tmp_path / "journal"
    journal.touch()
    async with fleet(count, server.url) as processes:
        for each in processes:
            each.tell("contend", "a", 200 // count, 3, journal)
        with anyio.fail_after(60):
            for each in processes:
                assert await each.hears() == "done"
    tokens = check_journal(journal.read_text())
    assert len(tokens) == 600
    assert tokens == sorted(set(tokens))


async def test_a_killed_holder_loses_the_lock_when_its_time_is_up(server: Server, cache: Cache) -> None:
    async with fleet(1, server.url) as (holder,):
        token = token_of(await holder.do("acquire", "a", 1.5, 0))
        await asyncio.sleep(2)
        with pytest.raises(LockNotAcquired):
            await cache.lock("a", wait=0).acquire()  # The holder renews its lease.
        holder.kill()
        began = time.monotonic()
        async with cache.lock("a", wait=10) as lock:
            assert time.monotonic() - began < within(1.5)
            assert lock.token > token


async def test_a_holder_that_was_paused_past_its_lease_is_refused_by_the_resource(server: Server, cache: Cache) -> None:
    resource = Resource()
    async with fleet(1, server.url) as (holder,):
        stale = token_of(await holder.do("acquire", "a", 1, 0))
        assert resource.write(stale)
        holder.pause()
        async with cache.lock("a", wait=10) as lock:
            assert lock.token > stale
            assert resource.write(lock.token)
            holder.resume()
            assert not resource.write(stale)
            assert await holder.do("lost", "a") == "True"
            assert await holder.do("release", "a") == "lock_not_owned"
            assert await cache.lock("a").is_locked()
        assert resource.refused == 1


@pytest.mark.parametrize("how", ["kill", "pause"])
async def test_a_waiter_whose_process_is_gone_holds_nobody_up_for_long(server: Server, cache: Cache, how: str) -> None:
    async with fleet(1, server.url) as (gone,), cache_at(server) as third:
        async with cache.lock("a", ttl=60):
            gone.tell("acquire", "a", 60, 60)
            await queued(server, 1)
            await asyncio.sleep(0.3)
            waiting = asyncio.create_task(third.lock("a", wait=60).acquire())
            await queued(server, 2)
            getattr(gone, how)()
            await asyncio.sleep(0.1)
        began = time.monotonic()
        async with asyncio.timeout(30):
            await waiting
        assert time.monotonic() - began < (CLAIM if how == "kill" else within(CLAIM))
        if how == "pause":
            await waiting.result().release()
            gone.resume()
            token_of(await gone.hears())


async def test_a_server_that_was_killed_and_has_forgotten_everything(server: Server, cache: Cache) -> None:
    async with cache_at(server, "health_check_interval=0.3&connect_timeout=0.5") as other:
        lock = await cache.lock("a", ttl=2).acquire()
        waiting = [asyncio.create_task(other.lock("a", wait=20).acquire()) for _ in range(3)]
        await queued(server, 3)
        await asyncio.sleep(0.2)
        await anyio.to_thread.run_sync(server.kill)
        await anyio.to_thread.run_sync(server.start)
        tokens = [lock.token]
        for each in waiting:
            async with asyncio.timeout(30):
                had = await each
            tokens.append(had.token)
            await had.release()
        assert tokens == sorted(set(tokens))
        with anyio.fail_after(30):
            while not lock.lost:
                await asyncio.sleep(0.02)
        with pytest.raises(LockNotHeld):
            await lock.release()


async def test_tokens_grow_over_a_flush_and_the_holder_notices(server: Server, cache: Cache) -> None:
    lock = await cache.lock("a", ttl=1).acquire()
    await tell(server, "FLUSHALL")
    async with cache.lock("a", wait=0) as after:
        assert after.token > lock.token
        with anyio.fail_after(30):
            while not lock.lost:
                await asyncio.sleep(0.02)
        with pytest.raises(LockNotHeld):
            lock.check()
        assert after.held


async def test_who_waits_when_everything_is_flushed_gets_the_lock_all_the_same(server: Server, cache: Cache) -> None:
    lock = await cache.lock("a", ttl=1, renew=False).acquire()

    async def hold() -> None:
        async with cache.lock("a", wait=20):
            pass

    waiting = [asyncio.create_task(hold()) for _ in range(5)]
    await queued(server, 5)
    await tell(server, "FLUSHALL")
    async with asyncio.timeout(30):
        await asyncio.gather(*waiting)  # In any order, because the queue is lost.
    with pytest.raises(LockNotHeld):
        await lock.release()


async def test_scripts_that_the_server_forgot_are_sent_again(server: Server, cache: Cache) -> None:
    async with cache.lock("a"):
        await tell(server, "SCRIPT", "FLUSH")
    assert not await cache.lock("a").is_locked()


async def test_a_cancelled_waiter_leaves_the_queue(server: Server, cache: Cache) -> None:
    async with cache.lock("a"):
        waiting = [asyncio.create_task(cache.lock("a", wait=60).acquire()) for _ in range(20)]
        await queued(server, 20)
        for each in waiting:
            each.cancel()
        await queued(server, 0)
        with pytest.raises(LockNotAcquired):
            await cache.lock("a", wait=0.1).acquire()
        await queued(server, 0)
    async with cache.lock("a", wait=0):
        pass


async def test_what_was_given_up_before_it_came_is_refused(cache: Cache) -> None:
    way = cache.client.locks
    await way.ask(ReleaseLock("a", "late", abandon=True))
    assert isinstance(await way.ask(AcquireLock("a", "me", "late", 30.0, 5.0)), LockDenied)
    assert not await cache.lock("a").is_locked()


async def test_no_lock_is_taken_for_granted_while_the_server_is_down(server: Server, cache: Cache) -> None:
    async with cache_at(server, "connect_timeout=0.3", on_error="miss") as other:
        lock = await other.lock("a", ttl=2).acquire()
        await anyio.to_thread.run_sync(server.kill)
        assert await other.get("k") is None  # Reads continue.
        for wait in (0, 1):
            with pytest.raises((CacheBackendError, CircuitOpen)):
                await other.lock("b", wait=wait).acquire()
        with anyio.fail_after(30):
            while not lock.lost:
                await asyncio.sleep(0.02)
        with pytest.raises(CacheError):
            await lock.release()


async def test_who_waits_while_the_server_goes_away_is_told_why_in_the_end(server: Server, cache: Cache) -> None:
    lock = await cache.lock("a", ttl=1).acquire()
    waiting = asyncio.create_task(cache.lock("a", wait=3).acquire())
    await queued(server, 1)
    await anyio.to_thread.run_sync(server.kill)
    with pytest.raises((CacheBackendError, CircuitOpen, LockNotAcquired)) as failed:
        await waiting
    assert not isinstance(failed.value, LockNotAcquired)
    assert lock.lost


async def test_the_end_of_a_lock_is_told_by_whoever_takes_it_over(server: Server, cache: Cache) -> None:
    with cache.events(LockExpired) as events:
        lock = await cache.lock("a", ttl=0.1, renew=False, owner="slow").acquire()
        async with cache.lock("a", wait=5):
            pass
        event = await anext(events)
        assert isinstance(event, LockExpired)
        assert (event.key, event.owner, event.token) == ("a", "slow", lock.token)


async def test_nothing_is_left_of_locks_that_were_given_back_but_their_tokens(server: Server, cache: Cache) -> None:
    for n in range(20):
        async with cache.lock(f"n{n}"):
            waiting = asyncio.create_task(cache.lock(f"n{n}", wait=5).acquire())
            await queued(server, 1, f"n{n}")
        await (await waiting).release()
    keys = (await tell(server, "KEYS", "*")).count(b"fleet#lock")
    assert keys == 20
    ttl = int((await tell(server, "TTL", "fleet#lock:{n1}")).strip(b":\r\n"))
    assert 6 * 86_400 < ttl <= 7 * 86_400


async def test_a_user_needs_no_more_rights_than_documented(server: Server) -> None:
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    words = re.findall(r"`([^`]+)`", page.partition("### Rights for locks")[2].partition("###")[0])
    assert words[:2] == ["~<namespace>#lock:*", "&<namespace>#lock:*"]
    commands = words[2:]
    rights = [f"+{each}" for group in commands for each in group.split()]
    await tell(
        server, "ACL", "SETUSER", "least", "on", ">pw", "resetchannels", "~fleet#lock:*", "&fleet#lock:*", *rights
    )
    url = f"redis://least:pw@127.0.0.1:{server.port}?health_check_interval=0.2"
    async with (
        open_cache("memory://", locks=url, namespace="fleet") as one,
        open_cache("memory://", locks=url, namespace="fleet") as two,
    ):
        lock = await one.lock("a", ttl=60).acquire()
        await lock.extend()

        async def wait(cache: Cache) -> None:
            async with cache.lock("a", wait=60):
                pass

        waiting = [asyncio.create_task(wait(each)) for each in (one, two, one, two)]
        await queued(server, 4)
        await asyncio.sleep(0.3)
        waiting.pop().cancel()
        await queued(server, 3)
        await lock.release()
        async with asyncio.timeout(30):  # By pushes. Without them, this would take as long as the lease.
            await asyncio.gather(*waiting)
        expired = await one.lock("a", ttl=0.05, renew=False).acquire()
        async with two.lock("a", wait=5):
            assert expired.lost
