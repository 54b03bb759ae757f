from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from cachebus import open_cache
from cachebus.actors import BackendActor
from cachebus.actors.ports import NO_PROGRESS, SYSTEM_CLOCK, PipelinedStore
from cachebus.adapters.chaos import ChaosStore
from cachebus.adapters.redis.store import RedisStore
from cachebus.messages import (
    Add,
    Clear,
    Delete,
    DeleteMany,
    Failed,
    Found,
    Get,
    GetMany,
    Increment,
    Set,
    SetMany,
    Stored,
)
from cachebus.node.stores import build_store
from cachebus.settings import backend_from_url
from cachebus.testing.servers import Server, redis_command

from ...faults.scene import guarded
from .conftest import one, opened, submitted


async def call_server(server: Server, *words: str) -> str:
    return (await anyio.to_thread.run_sync(redis_command, server, *words)).decode()


async def calls(server: Server) -> dict[str, int]:
    """Return the number of calls of each command since the last `CONFIG RESETSTAT`."""
    lines = (await call_server(server, "INFO", "commandstats")).splitlines()
    found = {
        line.partition(":")[0][8:]: int(line.split("calls=")[1].split(",")[0]) for line in lines if "calls=" in line
    }
    return {name: count for name, count in found.items() if name not in {"info", "config|resetstat", "time"}}


async def connections(server: Server) -> int:
    """Return the number of clients, except the one that counts."""
    lines = (await call_server(server, "CLIENT", "LIST")).splitlines()
    return sum("cmd=client" not in line for line in lines if line.startswith("id="))


async def test_a_batch_of_gets_is_one_command_and_equal_keys_are_one_key(store: Any, server: Server) -> None:
    await call_server(server, "CONFIG", "RESETSTAT")
    await store.execute([Get(f"k{number % 50}") for number in range(100)])
    await store.execute([Get("a"), GetMany(("b", "c")), Get("b")])
    assert await calls(server) == {"mget": 2}
    await call_server(server, "CONFIG", "RESETSTAT")
    await store.execute([Set("a", 1), Set("b", 2)])
    assert (await calls(server))["evalsha"] == 1


async def test_what_many_callers_ask_at_once_leaves_in_a_few_commands(server: Server) -> None:
    async with open_cache(server.url) as cache:
        await call_server(server, "CONFIG", "RESETSTAT")
        await asyncio.gather(*(cache.get(f"k{number}") for number in range(640)))
        assert (await calls(server))["mget"] <= 11


async def test_a_batch_is_sent_before_the_one_before_it_is_answered(server: Server) -> None:
    async with opened(f"{server.url}?window=3&health_check_interval=none") as store:
        await anyio.to_thread.run_sync(server.pause)
        try:
            done: list[Any] = []
            for number in range(3):
                await store.submit([Set("a", number), Get("a")], done.append)
            with anyio.move_on_after(0.05) as late:
                await store.submit([Get("a")], done.append)
            assert late.cancelled_caught
            assert done == []
        finally:
            await anyio.to_thread.run_sync(server.resume)
        assert (await one(store, Get("a"))).value == 2
        assert [replies[1].value for replies in done] == [0, 1, 2]


@pytest.mark.parametrize("most", [1, 2, 3])
async def test_there_are_never_more_connections_than_allowed(server: Server, most: int) -> None:
    async with open_cache(f"{server.url}?max_connections={most}") as cache:
        await cache.set_many({f"k{number}": number for number in range(500)})

        async def use(number: int) -> None:
            await cache.get(f"k{number}")
            if number % 50 == 0:
                await cache.delete_pattern(f"k{number}*")

        async with asyncio.TaskGroup() as group:
            for number in range(1000):
                group.create_task(use(number))
            for _ in range(5):
                assert await connections(server) <= most
        assert await connections(server) == most
    with anyio.fail_after(30):
        while await connections(server):
            await anyio.sleep(0.01)


async def test_a_read_does_not_wait_for_a_clear(server: Server) -> None:
    async with open_cache(server.url, timeout=20.0, on_error="raise") as cache:
        for start in range(0, 30_000, 5_000):
            await cache.set_many(dict.fromkeys((f"k{number}" for number in range(start, start + 5_000)), 1))
        await cache.set("mine", 1)
        clear = asyncio.create_task(cache.clear())
        await asyncio.sleep(0)
        reads = 0
        while not clear.done():
            await cache.get("mine")
            reads += 1
        assert reads > 5
        assert [key async for key in cache.scan()] == []


@pytest.mark.parametrize("seed", range(4))
async def test_a_caller_who_goes_away_leaves_no_reply_to_the_next(server: Server, seed: int) -> None:
    chance = random.Random(seed)
    async with open_cache(f"{server.url}?window={chance.choice([1, 2, 8])}", timeout=10.0, on_error="raise") as cache:
        await cache.set_many({f"k{number}": f"v{number}" for number in range(200)})
        wrong: list[Any] = []
        answered = 0

        async def ask(number: int) -> None:
            nonlocal answered
            if number % 7 == 0:
                value = (await cache.get_many([f"k{number}"])).get(f"k{number}")
            elif number % 11 == 0:
                await cache.set(f"k{number}", f"v{number}")
                value = await cache.get(f"k{number}")
            else:
                value = await cache.get(f"k{number}")
            answered += 1
            if value != f"v{number}":
                wrong.append((number, value))

        for _ in range(300):
            tasks = [asyncio.create_task(ask(chance.randrange(200))) for _ in range(chance.randrange(1, 60))]
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            for task in chance.sample(tasks, len(tasks) // 3):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert wrong == []
        assert answered > 2000


async def test_a_cancelled_batch_is_read_to_its_end(store: Any) -> None:
    await store.execute([Set(f"k{number}", number) for number in range(100)])
    for number in range(100):
        with anyio.move_on_after(0.0001 * (number % 5)):
            await store.execute([Get(f"k{number}"), Get("none")])
        assert (await one(store, Get(f"k{number}"))).value == number


async def test_a_run_of_small_values_is_one_command_a_key_with_growing_versions(store: Any, server: Server) -> None:
    later = 2e15  # A version from a server whose clock was ahead.
    script = "redis.call('SET', KEYS[1], struct.pack('>dd', ARGV[1], 0) .. 'Bold')"
    await call_server(server, "EVAL", script, "1", "tests:late", f"{later:.0f}")
    await call_server(server, "RPUSH", "tests:list", "x")
    await call_server(server, "CONFIG", "RESETSTAT")
    keys = ["new", "late", "list", "new"]
    replies = await store.execute([Set(key, b"v", ttl=100.0) for key in keys])
    assert "getrange" not in await calls(server)
    assert replies[1] == Stored(later + 1)
    assert replies[3] == Stored(replies[0].version + 1)
    for key, reply in zip(keys[1:], replies[1:], strict=True):
        found = await one(store, Get(key))
        assert (found.value, found.version) == (b"v", reply.version)
        assert 99 < found.ttl <= 100
    assert 99_000 < int((await call_server(server, "PTTL", "tests:list"))[1:]) <= 100_000
    first, second = await store.execute([Set("a", b"1", ttl=None), Set("b", bytes(2000), ttl=None)])
    assert first.version == second.version
    assert await call_server(server, "PTTL", "tests:a") == await call_server(server, "PTTL", "tests:b")
    mixed = await store.execute([Set("a", b"1", ttl=None), Set("b", b"2", ttl=5.0)])
    assert [type(each) for each in mixed] == [Stored, Stored]
    assert 4000 < int((await call_server(server, "PTTL", "tests:b"))[1:]) <= 5000


async def test_scripts_that_the_server_forgot_are_sent_again(store: Any, server: Server) -> None:
    await one(store, Set("a", 1))
    await call_server(server, "SCRIPT", "FLUSH")
    replies = await store.execute([Set("a", 2), Get("b"), Set("c", 3)])
    assert isinstance(replies[0], Stored)
    assert isinstance(replies[2], Stored)
    assert [found.value for found in await store.execute([Get("a"), Get("c")])] == [2, 3]
    await call_server(server, "CONFIG", "RESETSTAT")
    await one(store, Set("a", 1))
    assert "eval" not in await calls(server)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("last", [Delete("k"), DeleteMany(("x", "k")), Set("k", "new"), SetMany({"k": "new"})])
@pytest.mark.parametrize("first", [Set("k", "old"), SetMany({"k": "old", "other": 1}), Add("k", "old"), Increment("k")])
async def test_what_a_server_forgot_how_to_write_is_not_written_after_what_came_later(
    store: Any, server: Server, first: Any, last: Any, together: bool
) -> None:
    await store.execute([Set("warm", 1), Delete("k"), Delete("other")])
    await call_server(server, "SCRIPT", "FLUSH")
    if together:
        replies = await store.execute([first, last])
    else:
        replies = await submitted(store, first, last)
    assert not isinstance(replies[1], Failed)
    found = await one(store, Get("k"))
    assert (found.value if isinstance(found, Found) else None) == ("new" if isinstance(last, Set | SetMany) else None)
    if isinstance(replies[0], Failed):
        assert "NOSCRIPT" in str(replies[0].error())
        assert not replies[0].error().transient  # A retry would be even later.
    if isinstance(first, SetMany):
        assert isinstance(await one(store, Get("other")), Found)


async def test_the_health_check_keeps_an_idle_connection_in_use(server: Server) -> None:
    async with opened(f"{server.url}?health_check_interval=0.02"):
        await call_server(server, "CONFIG", "RESETSTAT")
        await anyio.sleep(0.2)
        assert "cmdstat_time:calls=" in await call_server(server, "INFO", "commandstats")


async def test_closing_finishes_what_is_under_way(server: Server) -> None:
    done: list[Any] = []
    async with opened(server.url) as store:
        await store.execute([Set("a", 1)])
        await store.submit([Get("a")], done.append)
        await store.submit([Clear()], done.append)
    assert len(done) == 2
    assert done[0][0].value == 1
    await store.close()


async def test_a_chaos_store_in_front_still_works(server: Server) -> None:
    async with opened(server.url) as store:
        chaos = ChaosStore(store, seed=1)
        assert isinstance((await chaos.execute([Set("a", 1), Get("a"), Delete("a")]))[0], Stored)


async def test_the_actor_counts_and_tells_what_came_of_pipelined_batches(server: Server) -> None:
    async with open_cache(server.url) as cache:
        await cache.clear()
        async with cache.events("cache_*") as events:
            await cache.set("a", 1)
            await cache.get("a")
            await cache.get("b")
            await cache.clear()
            kinds = [type(await anext(events)).__name__ for _ in range(4)]
        assert kinds == ["CacheSet", "CacheHit", "CacheMiss", "CacheCleared"]
        counted = await cache.statistics()
        assert (counted.hits, counted.misses, counted.sets) == (1, 1, 1)


def test_a_redis_store_is_pipelined_and_its_actor_takes_batches_of_its_size() -> None:
    store: Any = build_store(backend_from_url("redis://"), namespace="n", clock=SYSTEM_CLOCK)
    assert isinstance(store, RedisStore)
    assert isinstance(store, PipelinedStore)
    assert BackendActor(store).max_batch == store.max_batch


async def test_a_store_that_loses_count_crashes_its_actor_and_everybody_is_answered(server: Server) -> None:
    class Miscounting(RedisStore):
        def try_submit(self, batch: Sequence[Any], on_replies: Any) -> Any:
            on_replies([])
            return NO_PROGRESS

    settings: Any = backend_from_url(server.url)
    from cachebus.adapters.redis.store import Endpoint

    host, _, port = settings.hosts[0].rpartition(":")

    def stores(_: Any) -> Any:
        return Miscounting([Endpoint(host, int(port))], namespace="n")

    async with guarded(server.url, stores=stores, timeout=2.0) as cache:
        results = await asyncio.gather(*(cache.set("a", 1) for _ in range(5)), return_exceptions=True)
    assert {type(result).__name__ for result in results} <= {"ActorFailed", "CacheTimeoutError", "CacheClosed"}
