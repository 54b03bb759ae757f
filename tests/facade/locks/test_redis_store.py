"""The lock store of Redis, without a manager."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from cachebus.bus import SYSTEM_CLOCK
from cachebus.messages import (
    AcquireLock,
    CacheConfigurationError,
    DescribeLock,
    Failed,
    LockFree,
    LockGranted,
    LockQueued,
    NotHeld,
    Released,
    ReleaseLock,
)
from cachebus.node.stores import build_lock_store
from cachebus.settings import backend_from_url
from cachebus.testing.proxy import Proxy
from cachebus.testing.servers import Server, redis_command, run_redis

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with run_redis() as running:
        yield running


class Heard:
    """`LockListener` that records its notifications."""

    def __init__(self) -> None:
        self.looks: asyncio.Queue[str] = asyncio.Queue()

    def granted(self, name: str, ticket: str, grant: LockGranted) -> None: ...

    def look(self, name: str, ticket: str = "", delay: float = 0.0) -> None:
        if ticket:
            self.looks.put_nowait(ticket)

    def look_everywhere(self) -> None:
        self.looks.put_nowait("everywhere")

    def expired(self, name: str, owner: str, token: int) -> None: ...

    async def next(self) -> str:
        with anyio.fail_after(10):
            return await self.looks.get()


def store_at(url: str) -> tuple[Any, Heard]:
    store: Any = build_lock_store(backend_from_url(url), namespace="stores", clock=SYSTEM_CLOCK)
    heard = Heard()
    store.listener = heard
    return store, heard


async def one(store: Any, request: Any) -> Any:
    (reply,) = await store.execute([request])
    return reply


async def test_a_store_that_was_closed_and_opened_again_hears_that_a_lock_is_free(server: Server) -> None:
    (holder, _), (waiter, heard) = store_at(server.url), store_at(server.url)
    await holder.open()
    assert isinstance(await one(holder, AcquireLock("a", "holder", "t1", 30.0)), LockGranted)
    for _ in range(2):
        await waiter.open()
        assert isinstance(await one(waiter, AcquireLock("a", "waiter", "t2", 30.0, 30.0)), LockQueued)
        assert await heard.next() == "everywhere"
        await waiter.close()
    await waiter.open()
    assert isinstance(await one(waiter, AcquireLock("a", "waiter", "t2", 30.0, 30.0)), LockQueued)
    assert await heard.next() == "everywhere"
    assert isinstance(await one(holder, ReleaseLock("a", "t1")), Released)
    assert await heard.next() == "t2"
    assert isinstance(await one(waiter, AcquireLock("a", "waiter", "t2", 30.0)), LockGranted)
    await waiter.close()
    await holder.close()


async def test_whoever_may_not_be_told_does_not_wait(server: Server) -> None:
    words = ("ACL", "SETUSER", "deaf", "on", ">pw", "+@all", "-subscribe", "~*", "&*")
    await anyio.to_thread.run_sync(lambda: redis_command(server, *words))
    store, heard = store_at(f"redis://deaf:pw@{server.host}:{server.port}")
    await store.open()
    assert isinstance(await one(store, AcquireLock("b", "holder", "t1", 30.0)), LockGranted)
    assert isinstance(await one(store, AcquireLock("b", "waiter", "t2", 30.0, 30.0)), LockQueued)
    assert await heard.next() == "everywhere", "waiters must ask again to get the error"
    reply = await one(store, AcquireLock("b", "waiter", "t2", 30.0, 30.0))
    assert isinstance(reply, Failed)
    assert isinstance(reply.error(), CacheConfigurationError)
    assert isinstance(await one(store, ReleaseLock("b", "t1")), Released)
    await store.close()


async def test_a_reply_that_comes_while_the_store_is_closed_breaks_nothing(server: Server) -> None:
    troubles: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: troubles.append(context))
    with Proxy.before(server) as proxy:
        (holder, _), (waiter, _) = store_at(server.url), store_at(proxy.url(server.url))
        await holder.open()
        await waiter.open()
        assert isinstance(await one(holder, AcquireLock("d", "holder", "t1", 30.0)), LockGranted)
        assert await one(waiter, DescribeLock("d"))
        proxy.switch("latency", seconds=0.2)
        asked = asyncio.create_task(one(waiter, AcquireLock("d", "waiter", "t2", 30.0, 30.0)))
        await asyncio.sleep(0.05)
        await waiter.close()
        with anyio.fail_after(5):
            assert isinstance(await asked, LockQueued | Failed)
        await holder.close()
    assert not troubles


async def kept_for(server: Server, name: str) -> float:
    """Return the number of days for which the server keeps a lock."""
    said = await anyio.to_thread.run_sync(lambda: redis_command(server, "TTL", f"stores#lock:{{{name}}}"))
    return int(said.strip(b":\r\n")) / 86_400


async def test_a_lock_is_remembered_for_longer_than_it_is_held(server: Server) -> None:
    store, _ = store_at(server.url)
    await store.open()
    assert isinstance(await one(store, AcquireLock("e", "holder", "t0", 30.0)), LockGranted)
    assert isinstance(await one(store, ReleaseLock("e", "t0")), Released)
    assert isinstance(await one(store, AcquireLock("e", "holder", "t1", 30 * 86_400.0)), LockGranted)
    assert await kept_for(server, "e") > 30
    assert isinstance(await one(store, AcquireLock("e", "waiter", "t2", 1.0, 5.0)), LockQueued)
    assert await kept_for(server, "e") > 30
    await store.close()


@pytest.mark.parametrize("ago", [86_400.0, -86_400.0], ids=["used yesterday", "the clock was set back"])
async def test_a_lock_that_is_used_is_remembered_for_a_week_from_then(server: Server, ago: float) -> None:
    store, _ = store_at(server.url)
    await store.open()
    state, token = "stores#lock:{f}", int((time.time() - ago) * 1e6)
    await anyio.to_thread.run_sync(lambda: redis_command(server, "HSET", state, "n", str(token)))
    await anyio.to_thread.run_sync(lambda: redis_command(server, "EXPIRE", state, "100"))
    granted = await one(store, AcquireLock("f", "holder", "t1", 30.0))
    assert isinstance(granted, LockGranted)
    assert granted.token > token
    assert await kept_for(server, "f") > 6
    assert isinstance(await one(store, ReleaseLock("f", "t1", token=granted.token)), Released)
    await store.close()


async def test_an_offer_that_is_heard_late_takes_the_lock_from_nobody(server: Server) -> None:
    (holder, _), (waiter, heard) = store_at(server.url), store_at(server.url)
    await holder.open()
    await waiter.open()
    decline = ReleaseLock("c", "t2", unclaimed=True, offered=True)
    assert isinstance(await one(holder, AcquireLock("c", "holder", "t1", 30.0)), LockGranted)
    assert isinstance(await one(waiter, AcquireLock("c", "waiter", "t2", 30.0, 30.0)), LockQueued)
    assert await heard.next() == "everywhere"
    assert isinstance(await one(holder, ReleaseLock("c", "t1")), Released)
    # It asks again by itself, and gets the lock before the offer arrives.
    assert isinstance(await one(waiter, AcquireLock("c", "waiter", "t2", 30.0, 30.0)), LockGranted)
    assert await heard.next() == "t2"
    assert await one(waiter, decline) == NotHeld()
    assert (await one(holder, DescribeLock("c"))).owner == "waiter"
    assert isinstance(await one(waiter, ReleaseLock("c", "t2")), Released)
    # An offer without a claim is declined.
    assert isinstance(await one(holder, AcquireLock("c", "holder", "t3", 30.0)), LockGranted)
    assert isinstance(await one(waiter, AcquireLock("c", "waiter", "t4", 30.0, 30.0)), LockQueued)
    assert isinstance(await one(holder, ReleaseLock("c", "t3")), Released)
    assert await heard.next() == "t4"
    assert isinstance(await one(waiter, ReleaseLock("c", "t4", unclaimed=True, offered=True)), Released)
    assert await one(holder, DescribeLock("c")) == LockFree()
    await waiter.close()
    await holder.close()
