"""Locks over a real Memcached, which may lose them at any time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator

import anyio
import pytest

import cachebus.settings  # noqa: F401 (which blocks, as an import does, if a test is the first to open a cache)
from cachebus import Cache, CacheConnectionError, open_cache
from cachebus.messages import LockNotAcquired, LockNotHeld
from cachebus.testing.servers import Server, run_memcached

from .fleet import fleet, token_of

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def server() -> Iterator[Server]:
    with run_memcached() as running:
        yield running


@pytest.fixture
async def cache(server: Server) -> AsyncIterator[Cache]:
    async with open_cache(f"memcached://127.0.0.1:{server.port}", namespace="fleet") as made:
        yield made


def say(server: Server, command: bytes) -> bytes:
    with socket.create_connection((server.host, server.port), 5) as connection:
        connection.sendall(command + b"\r\n")
        return connection.recv(1 << 16)


async def gets(server: Server) -> int:
    """Return the number of item commands that the server has received."""
    stats = (await anyio.to_thread.run_sync(say, server, b"stats")).decode().split("\r\n")
    found = dict(line.split(" ")[1:3] for line in stats if line.startswith("STAT "))
    return int(found["cmd_get"]) + int(found["cmd_set"])


@pytest.mark.parametrize("how", ["flush", "restart"])
async def test_a_lock_that_the_server_forgot_is_seen_to_be_lost_and_tokens_grow(
    server: Server, cache: Cache, how: str
) -> None:
    lock = await cache.lock("a", ttl=1.5).acquire()
    if how == "flush":
        assert await anyio.to_thread.run_sync(say, server, b"flush_all") == b"OK\r\n"
    else:
        await anyio.to_thread.run_sync(server.restart)
    with anyio.fail_after(30):
        while True:
            try:
                after = await cache.lock("a", wait=3).acquire()
                break
            except CacheConnectionError:
                continue  # The server has just restarted.
    assert after.token > lock.token
    with anyio.fail_after(30):
        while not lock.lost:
            await asyncio.sleep(0.02)
    with pytest.raises(LockNotHeld):
        await lock.release()
    assert after.held


async def test_one_of_all_who_wait_in_a_process_asks_and_not_often(server: Server, cache: Cache) -> None:
    async with cache.lock("a", ttl=60):
        waiting = [asyncio.create_task(cache.lock("a", wait=60).acquire()) for _ in range(200)]
        await asyncio.sleep(1)
        before = await gets(server)
        await asyncio.sleep(2)
        # Each attempt is a failed `add`, a read of the holder, and a read of the withdrawn tickets.
        assert 1 <= await gets(server) - before <= 3 * 2 / 0.1
    for each in waiting:
        async with asyncio.timeout(30):
            await (await each).release()


async def test_a_killed_holder_loses_the_lock_soon_after_its_time_is_up(server: Server, cache: Cache) -> None:
    async with fleet(1, f"memcached://127.0.0.1:{server.port}") as (holder,):
        token = token_of(await holder.do("acquire", "a", 1, 0))
        with pytest.raises(LockNotAcquired):
            await cache.lock("a", wait=0).acquire()
        holder.kill()
        async with asyncio.timeout(30), cache.lock("a", wait=20) as lock:
            assert lock.token > token


async def test_a_cancelled_waiter_is_not_asked_for_any_more(server: Server, cache: Cache) -> None:
    async with cache.lock("a", ttl=60):
        waiting = asyncio.create_task(cache.lock("a", wait=60).acquire())
        await asyncio.sleep(0.3)
        waiting.cancel()
        await asyncio.sleep(0.2)
        before = await gets(server)
        await asyncio.sleep(0.7)
        assert await gets(server) == before
    async with cache.lock("a", wait=1):
        pass
