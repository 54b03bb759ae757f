"""Locks of a worker, used by other processes over NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest

from cachebus import Cache, Node, NoSuchActor, Settings, open_cache
from cachebus.bus import Address
from cachebus.messages import LockNotAcquired, LockNotHeld
from cachebus.testing.servers import Server, run_nats, run_redis

from .fleet import check_journal, fleet, token_of

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def nats() -> Iterator[Server]:
    with run_nats() as running:
        yield running


@pytest.fixture(params=["memory", "redis", "two workers of redis"])
async def caches(request: pytest.FixtureRequest, nats: Server) -> AsyncIterator[tuple[Cache, Cache]]:
    """Open two clients of a worker."""
    async with AsyncExitStack() as stack:
        url = "memory://" if request.param == "memory" else stack.enter_context(run_redis()).url
        for _ in range(2 if request.param.startswith("two") else 1):
            settings: Any = Settings(namespace="fleet", bus=nats.url, backends=[url])  # type: ignore[arg-type]
            await stack.enter_async_context(Node(settings, serve=True))
        first, second = [
            await stack.enter_async_context(open_cache("bus:primary", bus=nats.url, namespace="fleet"))
            for _ in range(2)
        ]
        yield first, second


async def test_clients_of_a_worker_share_its_locks(caches: tuple[Cache, Cache]) -> None:
    one, two = caches
    async with one.lock("a", owner="one") as lock:
        with pytest.raises(LockNotAcquired, match="'one' holds it"):
            await two.lock("a", wait=0).acquire()
        await lock.extend(40)
        info = await two.lock("a").info()
        assert info is not None
        assert info.token == lock.token
        waiting = asyncio.create_task(two.lock("a", wait=30).acquire())
        await asyncio.sleep(0.2)
    async with asyncio.timeout(30):
        had = await waiting
    assert had.token > lock.token
    await had.release()
    with pytest.raises(LockNotHeld):
        await had.release()


async def test_a_client_that_gives_up_gets_no_lock(caches: tuple[Cache, Cache]) -> None:
    one, two = caches
    async with one.lock("a"):
        waiting = [asyncio.create_task(two.lock("a", wait=30).acquire()) for _ in range(20)]
        await asyncio.sleep(0.2)
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    async with one.lock("a", wait=5):
        pass


async def test_clients_contend_and_never_overlap(nats: Server, caches: tuple[Cache, Cache], tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.touch()
    async with fleet(2, "bus:primary", nats.url) as processes:
        for each in processes:
            each.tell("contend", "a", 20, 3, journal)
        with anyio.fail_after(60):
            for each in processes:
                assert await each.hears() == "done"
    tokens = check_journal(journal.read_text())
    assert len(tokens) == 120
    assert tokens == sorted(set(tokens))


async def test_a_client_that_is_killed_loses_the_lock_when_its_time_is_up(
    nats: Server, caches: tuple[Cache, Cache]
) -> None:
    async with fleet(1, "bus:primary", nats.url) as (holder,):
        token = token_of(await holder.do("acquire", "a", 1, 0))
        holder.kill()
        async with asyncio.timeout(30), caches[0].lock("a", wait=20) as lock:
            assert lock.token > token


async def test_locks_that_are_somewhere_else_are_at_an_address_of_their_own(nats: Server) -> None:
    options: dict[str, Any] = {"bus": nats.url, "backends": ["memory://"], "locks": "memory://"}
    settings = Settings(namespace="elsewhere", **options)
    async with (
        Node(settings, serve=True),
        open_cache("memory://", bus=nats.url, namespace="elsewhere", locks="bus:locks") as one,
        open_cache("bus:primary", bus=nats.url, namespace="elsewhere") as two,
    ):
        assert one.client.locks.address == Address("locks")
        async with one.lock("a"):
            with pytest.raises(LockNotAcquired):
                await one.lock("a", wait=0).acquire()
            with pytest.raises(NoSuchActor):
                await two.lock("a", wait=0).acquire()


async def test_a_wait_goes_from_worker_to_worker_and_keeps_its_place(
    nats: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("PARKED", 0.2), ("KEPT", 0.3)):
        monkeypatch.setattr(f"cachebus.actors.locks.manager.{name}", seconds)
    with run_redis() as redis:
        options: dict[str, Any] = {"bus": nats.url, "backends": [redis.url]}
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(Node(Settings(namespace="moving", **options), serve=True))
            one, two = [
                await stack.enter_async_context(open_cache("bus:primary", bus=nats.url, namespace="moving"))
                for _ in range(2)
            ]
            order: list[int] = []

            async def work(number: int) -> None:
                async with two.lock("a", wait=60) as lock:
                    order.append(number)
                    await asyncio.sleep(0.6)  # A manager that forgot the lock would release it by now.
                    await lock.extend()

            async with asyncio.TaskGroup() as tasks, one.lock("a", ttl=60):
                for number in range(3):
                    tasks.create_task(work(number))
                    await asyncio.sleep(0.1)
                await asyncio.sleep(2)
            assert order == [0, 1, 2]
