"""A batch is sent within the call of `submit`: one batch at a time for each server, and to several servers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from cachebus.actors.ports import PipelinedStore
from cachebus.adapters.memcached.store import MemcachedStore
from cachebus.messages import Clear, Cleared, Failed, Found, Get, Reply, Request, Set, Stored
from cachebus.testing.proxy import Proxy
from cachebus.testing.servers import Server, run_memcached

from .conftest import count_trips, one, opened, sync


class Replies:
    """Callback that accepts the replies of one batch, once."""

    def __init__(self) -> None:
        self.come = anyio.Event()
        self.all: list[Any] = []

    def __call__(self, replies: Sequence[Reply]) -> None:
        assert not self.come.is_set()
        self.all = list(replies)
        self.come.set()

    async def wait(self) -> list[Any]:
        with anyio.fail_after(30):
            await self.come.wait()
        return self.all


async def test_a_lone_batch_is_sent_before_the_call_returns(
    store: MemcachedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(store, PipelinedStore)
    await one(store, Set("k", b"1"))
    sent, first, second = count_trips(store, monkeypatch), Replies(), Replies()
    progress = store.try_submit([Get("k")], first)
    assert progress is not None
    assert len(sent) == 1
    assert store.try_submit([Get("k")], second) is None, "one batch at a time"
    assert len(sent) == 1
    (found,) = await first.wait()
    assert found.value == b"1"
    started = progress.last_progress
    assert store.try_submit([Set("k", b"2"), Get("k")], second) is not None
    stored, found = await second.wait()
    assert isinstance(stored, Stored)
    assert (found.value, found.version) == (b"2", stored.version)
    assert progress.last_progress >= started


async def test_batches_that_wait_are_sent_in_their_order(store: MemcachedStore) -> None:
    await one(store, Get("k"))
    taken = [Replies() for _ in range(20)]
    async with anyio.create_task_group() as tasks:
        for number, each in enumerate(taken):
            tasks.start_soon(store.submit, [Set("k", number), Get("k")], each)
            await anyio.wait_all_tasks_blocked()
    versions: list[float] = []
    for number, each in enumerate(taken):
        stored, found = await each.wait()
        assert found.value == number
        versions.append(stored.version)
    assert versions == sorted(versions)


async def test_a_waiting_batch_that_is_given_up_is_not_sent_and_holds_up_no_other(server: Server) -> None:
    with Proxy.before(server) as proxy:
        async with opened(proxy) as store:
            await one(store, Set("k", b"1"))
            await sync(lambda: proxy.switch("latency", seconds=0.2))
            first, second, third = Replies(), Replies(), Replies()
            assert store.try_submit([Get("k")], first) is not None
            with anyio.move_on_after(0.01) as scope:
                await store.submit([Set("k", b"2")], second)
            assert scope.cancelled_caught
            await store.submit([Get("k")], third)
            assert (await first.wait())[0].value == b"1"
            assert (await third.wait())[0].value == b"1"
            assert not second.come.is_set()


async def test_several_servers_work_at_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_memcached() as other:
        async with opened(server, other) as store:
            keys = [f"k{number}" for number in range(50)]
            await store.execute([Set(key, key.encode()) for key in keys])
            sent, replies = count_trips(store, monkeypatch), Replies()
            batch: list[Request[Any]] = [Get(key) for key in keys]
            assert store.try_submit(batch, replies) is not None
            assert len(sent) == 2, "sent to both before either has answered"
            assert [each.value for each in await replies.wait()] == [key.encode() for key in keys]


async def test_clear_keeps_its_place_at_every_server(server: Server) -> None:
    with run_memcached() as other:
        async with opened(server, other) as store:
            keys = [f"k{number}" for number in range(20)]
            batch: list[Request[Any]] = [
                *(Set(key, b"1") for key in keys),
                *(Get(key) for key in keys),
                Clear(),
                *(Get(key) for key in keys),
                *(Set(key, b"2") for key in keys),
                *(Get(key) for key in keys),
            ]
            replies: list[Any] = list(await store.execute(batch))
            assert not any(isinstance(reply, Failed) for reply in replies)
            assert [reply.value for reply in replies[20:40]] == [b"1"] * 20
            assert replies[40] == Cleared()
            assert not any(isinstance(reply, Found) for reply in replies[41:61])
            assert [reply.value for reply in replies[81:]] == [b"2"] * 20
