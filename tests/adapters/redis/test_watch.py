"""Waiting for the end of a lease that another process holds in Redis."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import anyio
import pytest

from cachebus.adapters.redis import pubsub as redis_watch
from cachebus.adapters.redis.pubsub import LeaseWatch
from cachebus.messages import (
    BadMessage,
    CacheClosed,
    CacheConfigurationError,
    CacheConnectionError,
    Failed,
    GetOrLease,
    LoaderFailed,
    Loading,
    NotHeld,
    Overloaded,
    ReleaseLease,
    Reply,
    Set,
    Stored,
    WatchLease,
)
from cachebus.testing.servers import Server, redis_command, run_redis, run_redis_cluster
from cachebus.testing.suite.base import granted

from .conftest import one, opened

LONG = 30.0


class PendingReply:
    """Callback that stores the reply to a waiter."""

    def __init__(self) -> None:
        self._reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

    def __call__(self, reply: Reply) -> None:
        self._reply.set_result(reply)  # Raises if it is called twice.

    @property
    def is_done(self) -> bool:
        return self._reply.done()

    async def reply(self) -> Reply:
        async with asyncio.timeout(30):
            return await self._reply


async def wait(store: Any, token: str, *, key: str = "k", wait: float = LONG) -> PendingReply:
    """Wait for a lease after the channel is subscribed."""
    # The first waiter is notified to check again once the channel is subscribed.
    while True:
        pending = PendingReply()
        store.watch(WatchLease(key, token, wait), pending)
        if "0/" in repr(store._watch):
            return pending
        if store._watch._subscription.is_up:
            return pending
        await pending.reply()


async def lease(store: Any, token: str, key: str = "k") -> str:
    return await granted(store, GetOrLease(key, "owner", token, 60.0))


@pytest.mark.parametrize("seconds", [math.nan, -1.0])
async def test_nobody_waits_for_no_time(server: Server, seconds: float) -> None:
    async with opened(server.url) as store:
        pending = PendingReply()
        store.watch(WatchLease("k", "t1", seconds), pending)
        reply = await pending.reply()
        assert isinstance(reply, Failed)
        assert isinstance(reply.error(), BadMessage)


async def test_who_waits_is_told_when_the_value_is_stored(server: Server) -> None:
    async with opened(server.url) as store, opened(server.url) as holder:
        stored = await lease(holder, "stored")
        pending, other = await wait(store, stored), await wait(store, "another")
        await one(holder, Set("k", b"v", lease=stored))
        assert await pending.reply() == NotHeld()
        assert not other.is_done


async def test_who_waits_is_told_what_the_loader_has_failed_with(server: Server) -> None:
    async with opened(server.url) as store, opened(server.url) as holder:
        given_back = await lease(holder, "given back", "k2")
        pending = await wait(store, given_back, key="k2")
        await one(holder, ReleaseLease("k2", given_back))
        assert await pending.reply() == NotHeld()
        failed = await lease(holder, "failed", "k2")
        pending = await wait(store, failed, key="k2")
        # Released by its requested name, the only one that a waiter knows.
        await one(holder, ReleaseLease("k2", "failed", "OSError"))
        reply = await pending.reply()
        assert isinstance(reply, Failed)
        assert isinstance(reply.error(), LoaderFailed)
        assert "OSError" in str(reply.error())


async def test_who_waits_is_told_of_a_write_that_overtakes_the_load(server: Server) -> None:
    async with opened(server.url) as store, opened(server.url) as holder:
        overtaken = await lease(holder, "overtaken", "k3")
        pending = await wait(store, overtaken, key="k3")
        await one(store, Set("k3", b"v"))
        assert await pending.reply() == NotHeld()


async def test_the_end_of_a_lease_is_remembered_for_those_who_ask_after_it(server: Server) -> None:
    async with opened(server.url) as store, opened(server.url) as holder:
        early, last = await lease(holder, "early", "k4"), await lease(holder, "the last", "k5")
        pending = await wait(store, last)
        await one(holder, ReleaseLease("k4", early, "KeyError"))
        await one(holder, ReleaseLease("k5", last))
        await pending.reply()
        late = PendingReply()
        store.watch(WatchLease("k4", early, LONG), late)
        assert late.is_done
        assert isinstance(await late.reply(), Failed)


async def test_nobody_waits_for_longer_than_it_has_said(server: Server) -> None:
    async with opened(server.url) as store:
        pending = await wait(store, "silence", wait=0.01)
        assert await pending.reply() == Loading("silence")
        assert repr(store._watch) == "<LeaseWatch 'tests#leases', 0/10000 waiting>"


async def test_the_channel_is_of_the_namespace(server: Server) -> None:
    async with opened(server.url, namespace="one") as store, opened(server.url, namespace="two") as other:
        same_name = await lease(other, "same name")
        pending = await wait(store, same_name)
        await one(other, ReleaseLease("k", same_name))
        await wait(other, "x")
        await one(other, ReleaseLease("k", "x"))
        assert not pending.is_done


async def test_nothing_is_connected_before_somebody_waits_and_an_idle_channel_is_left(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def channels() -> bytes:
        return await anyio.to_thread.run_sync(lambda: redis_command(server, "PUBSUB", "CHANNELS", "idle#*"))

    monkeypatch.setattr(redis_watch, "IDLE", 0.01)
    async with opened(server.url, namespace="idle") as store:
        token = await lease(store, "t")
        assert b"idle#leases" not in await channels()
        pending = await wait(store, token)
        assert b"idle#leases" in await channels()
        await one(store, ReleaseLease("k", token))
        assert await pending.reply() == NotHeld()
        with anyio.fail_after(30):
            while b"idle#leases" in await channels():
                await asyncio.sleep(0.01)
        pending = await wait(store, "again")
        await one(store, ReleaseLease("k", "again"))
        assert await pending.reply() == NotHeld()


async def test_after_a_gap_everybody_looks_for_itself() -> None:
    with run_redis() as server:
        async with opened(f"{server.url}?connect_timeout=0.5&health_check_interval=0.3") as store:
            pending = await wait(store, "t")
            await anyio.to_thread.run_sync(server.kill)
            await anyio.to_thread.run_sync(server.start)
            assert await pending.reply() == NotHeld()


async def test_a_channel_for_which_nobody_could_wait_is_left_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_watch, "IDLE", 0.01)
    with run_redis() as server:
        words = ("ACL", "SETUSER", "me", "on", ">pw", "+@all", "~*", "resetchannels")
        await anyio.to_thread.run_sync(lambda: redis_command(server, *words))
        async with opened(f"redis://me:pw@127.0.0.1:{server.port}") as store:
            pending = PendingReply()
            store.watch(WatchLease("k", "t", LONG), pending)
            assert isinstance(await pending.reply(), Failed)
            with anyio.fail_after(10):
                while store._watch._subscription is not None:
                    await asyncio.sleep(0.01)
            await anyio.to_thread.run_sync(lambda: redis_command(server, "ACL", "SETUSER", "me", "&*"))
            pending = await wait(store, "t", wait=0.05)
            assert await pending.reply() == Loading("t"), "access has been granted"


async def test_a_server_that_is_away_or_forbids_the_channel_is_not_waited_for() -> None:
    with run_redis() as server:
        async with opened(f"{server.url}?connect_timeout=0.5") as store:
            await anyio.to_thread.run_sync(server.kill)
            pending = PendingReply()
            store.watch(WatchLease("k", "t", LONG), pending)
            reply = await pending.reply()
            assert isinstance(reply, Failed)
            assert isinstance(reply.error(), CacheConnectionError)
            await anyio.to_thread.run_sync(server.start)
            with anyio.fail_after(30):
                while isinstance(reply, Failed):
                    pending = PendingReply()
                    store.watch(WatchLease("k", "t", 0.05), pending)
                    reply = await pending.reply()
                    await asyncio.sleep(0.01)
        words = ("ACL", "SETUSER", "me", "on", ">pw", "+@all", "-publish", "~*", "resetchannels")
        await anyio.to_thread.run_sync(lambda: redis_command(server, *words))
        async with opened(f"redis://me:pw@127.0.0.1:{server.port}") as store:
            for _ in range(2):
                pending = PendingReply()
                store.watch(WatchLease("k", "t", LONG), pending)
                reply = await pending.reply()
                assert isinstance(reply, Failed)
                assert isinstance(reply.error(), CacheConfigurationError)
            # The lease itself does not need the channel.
            token = await lease(store, "t")
            assert isinstance(await one(store, Set("k", b"v", lease=token)), Stored)
            assert isinstance(await one(store, Set("k", b"v")), Stored)


async def test_no_more_than_so_many_wait_and_closing_lets_nobody_wait(server: Server) -> None:
    async with opened(server.url) as store:
        watch = LeaseWatch(store.subscribe, "tests", limit=2)
        all_told = [PendingReply() for _ in range(3)]
        for number, pending in enumerate(all_told):
            watch.watch(WatchLease("k", f"t{number}", LONG), pending)
        reply = await all_told[2].reply()
        assert isinstance(reply, Failed)
        assert isinstance(reply.error(), Overloaded)
        await watch.close()
        await watch.close()
        reply = await all_told[0].reply()
        assert isinstance(reply, Failed)
        assert isinstance(reply.error(), CacheClosed)


async def test_in_a_cluster_it_is_told_by_whichever_server_has_the_key() -> None:
    with run_redis_cluster() as servers:
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in servers)
        async with opened(f"redis+cluster://{hosts}") as store, opened(f"redis+cluster://{hosts}") as holder:
            for number in range(6):
                key = f"key{number}"
                token = await lease(holder, f"t{number}", key)
                pending = await wait(store, token, key=key)
                await one(holder, Set(key, b"v", lease=token))
                assert await pending.reply() == NotHeld()
