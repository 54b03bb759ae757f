from __future__ import annotations

import random
import threading
from typing import Any

import anyio
import pytest

from cachebus.adapters.memcached.entry import HEADER
from cachebus.adapters.memcached.store import MemcachedStore
from cachebus.adapters.memcached.values import chunk_tails
from cachebus.messages import (
    CacheBackendError,
    CacheCapacityError,
    CapabilityError,
    Clear,
    Cleared,
    CompareAndSet,
    Delete,
    Deleted,
    DeletePattern,
    Exists,
    Failed,
    Found,
    Get,
    GetMany,
    Increment,
    Incremented,
    Missing,
    Present,
    Scan,
    Set,
    SetMany,
    Stored,
    Touch,
)
from cachebus.testing.servers import Server, run_memcached

from .conftest import name_of, one, opened, raw

# Versions and counters


async def test_compare_and_set_from_many_threads_loses_nothing(server: Server) -> None:
    failures: list[BaseException] = []

    def race() -> None:
        async def main() -> None:
            async with opened(server, namespace="races") as store:
                for _ in range(25):
                    while True:
                        found = await one(store, Get("n"))
                        if isinstance(await one(store, CompareAndSet("n", found.value + 1, found.version)), Stored):
                            break
                    await one(store, Increment("m", -2))

        try:
            anyio.run(main)
        except BaseException as error:
            failures.append(error)

    async with opened(server, namespace="races") as store:
        await store.execute([Set("n", 0), Set("m", 0)])
        threads = [threading.Thread(target=race) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            await anyio.to_thread.run_sync(thread.join)
        assert failures == []
        assert (await one(store, Get("n"))).value == 150
        assert (await one(store, Get("m"))).value == -300


async def test_a_count_that_others_come_before_again_and_again_gives_up_and_changes_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(server) as store:
        await one(store, Set("n", 5))
        monkeypatch.setattr("cachebus.adapters.memcached.cas_updates.TRIES", 0)
        error = (await one(store, Increment("n"))).error()
        assert isinstance(error, CacheBackendError)
        assert not error.transient
        assert (await one(store, Get("n"))).value == 5


async def test_versions_are_new_for_every_write_and_kept_by_touches(store: MemcachedStore) -> None:
    first = await one(store, Set("a", b"1"))
    await one(store, Touch("a", 60.0))
    touched = await one(store, Get("a"))
    assert (touched.version, touched.value) == (first.version, b"1")
    second = await one(store, CompareAndSet("a", b"2", first.version))
    assert second.version > first.version
    assert (await one(store, Touch("a", 1.0))).version == second.version


async def test_counts_of_one_batch_are_one_write(server: Server) -> None:
    async with opened(server) as store:
        await one(store, Set("n", 0))
        before = (await raw(server, "stats"))[b"cmd_set"]
        replies = await store.execute([Increment("n") for _ in range(50)])
        assert replies == [Incremented(number) for number in range(1, 51)]
        assert (await raw(server, "stats"))[b"cmd_set"] - before == 1


async def test_touches_of_one_batch_are_one_write(server: Server) -> None:
    async with opened(server) as store:
        stored = await one(store, Set("k", b"v", ttl=5.0))
        before = (await raw(server, "stats"))[b"cmd_set"]
        replies = await store.execute([Touch("k", ttl=60.0)] * 299 + [Touch("k", ttl=600.0)])
        assert {type(each) for each in replies} == {Present}
        assert {each.version for each in replies if isinstance(each, Present)} == {stored.version}
        assert (await raw(server, "stats"))[b"cmd_set"] == before + 1
        found = await one(store, Get("k"))
        assert found.version == stored.version
        assert found.ttl == pytest.approx(600.0, abs=5.0)


async def test_a_counter_keeps_its_time_however_often_it_counts(store: MemcachedStore) -> None:
    await one(store, Increment("n", ttl=2.0))
    with anyio.fail_after(30):
        while isinstance(await one(store, Increment("n", initial=None)), Incremented):
            pass
    assert await one(store, Get("n")) == Missing()


async def test_the_servers_clock_is_read_again_and_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachebus.adapters.memcached.connection.RESYNC", -1.0)
    async with opened(server) as store:
        before = (await raw(server, "stats"))[b"total_connections"]
        for number in range(20):
            await one(store, Set("a", number, ttl=60.0))
            found = await one(store, Get("a"))
            assert found.value == number
            assert found.ttl == pytest.approx(60.0, abs=5.0)  # Memcached's clock counts whole seconds.
        assert (await raw(server, "stats"))[b"total_connections"] - before == 1  # The connection of this query.


# Unsupported requests


@pytest.mark.parametrize("request_", [Scan("*"), DeletePattern("*")])
async def test_patterns_are_refused_and_never_a_silent_nothing(store: MemcachedStore, request_: Any) -> None:
    await one(store, Set("a", b"1"))
    assert isinstance((await one(store, request_)).error(), CapabilityError)
    assert not store.capabilities.patterns


# Generations


async def test_clear_is_seen_by_every_store_of_the_namespace_at_once(server: Server) -> None:
    async with opened(server, namespace="seen") as one_store, opened(server, namespace="seen") as other:
        await one(one_store, Set("a", b"1"))
        assert isinstance(await one(other, Get("a")), Found)
        assert await one(one_store, Clear()) == Cleared()
        assert await one(other, Get("a")) == Missing()
        await one(one_store, Clear())
        # The first command of the other store is a write with an outdated generation.
        assert isinstance(await one(other, Set("a", b"2")), Stored)
        assert (await one(one_store, Get("a"))).value == b"2"
        await one(one_store, Clear())
        assert await one(other, Increment("n", 5)) == Incremented(5)
        assert await one(one_store, Increment("n", 5)) == Incremented(10)


async def test_clear_in_a_batch_stands_between_its_neighbours(store: MemcachedStore) -> None:
    replies = await store.execute([Set("a", b"1"), Get("a"), Clear(), Get("a"), Set("a", b"2"), Get("a")])
    assert [type(reply) for reply in replies] == [Stored, Found, Cleared, Missing, Stored, Found]


async def test_a_lost_generation_brings_nothing_back(server: Server) -> None:
    async with opened(server, namespace="lost") as store:
        await store.execute([Set("a", b"old"), Clear(), Set("a", b"new")])
        await raw(server, "delete", "lost::")
        assert await one(store, Get("a")) == Missing()
        for _ in range(20):
            await raw(server, "delete", "lost::")
            assert [type(reply) for reply in await store.execute([Get("a"), Clear(), Get("a")])] == [
                Missing,
                Cleared,
                Missing,
            ]
        await raw(server, "set", "lost::", b"0")
        assert await one(store, Get("a")) == Missing()
        assert isinstance(await one(store, Set("a", b"3")), Stored)
        assert (await one(store, Get("a"))).value == b"3"


async def test_of_many_who_find_the_generation_lost_one_makes_it_for_all(server: Server) -> None:
    stores: list[MemcachedStore] = []

    async def write(number: int) -> None:
        async with opened(server, namespace="begin") as store:
            await one(store, Set(f"k{number}", number))
            stores.append(store)

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(write, number)
    async with opened(server, namespace="begin") as store:
        found = await one(store, GetMany(tuple(f"k{number}" for number in range(20))))
        assert len(found.entries) == 20


async def test_flush_all_by_somebody_is_a_miss_and_nothing_worse(server: Server) -> None:
    async with opened(server) as store:
        await one(store, SetMany({f"k{number}": number for number in range(100)}))
        await raw(server, "flush_all")
        replies = await store.execute([Get("k1"), Set("k1", b"1"), Get("k1"), Increment("n")])
        assert [type(reply) for reply in replies] == [Missing, Stored, Found, Incremented]


async def test_clear_during_traffic_never_shows_what_was_cleared(server: Server) -> None:
    async with opened(server, namespace="busy") as writer, opened(server, namespace="busy") as clearer:
        written = gone = 0
        stale: list[Any] = []
        done = False

        async def write() -> None:
            nonlocal written
            while not done:
                await one(writer, Set("a", written + 1))
                written += 1

        async def read() -> None:
            while not done:
                known = gone
                found = await one(clearer, Get("a"))
                if isinstance(found, Found) and found.value <= known:
                    stale.append((known, found.value))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            tasks.start_soon(read)
            for _ in range(50):
                before = written  # Values written before the clear must be gone after it.
                assert await one(clearer, Clear()) == Cleared()
                gone = before
            done = True
        assert stale == []
        assert written


# Chunks


async def test_large_values_in_chunks_come_back_whole(server: Server) -> None:
    chance = random.Random(1)
    async with opened(server, chunked=True) as store:
        values = {"a": chance.randbytes(2**20 + 1), "b": "text" * 10**6, "c": [chance.randbytes(900_000)] * 3}
        await one(store, SetMany(values, ttl=60.0))
        for key, value in values.items():
            assert (await one(store, Get(key))).value == value
        found = await one(store, GetMany((*values, "none")))
        assert {key: each.value for key, each in found.entries.items()} == values
        version = found.entries["a"].version
        assert isinstance(await one(store, CompareAndSet("a", b"x" * 2**21, version)), Stored)
        assert (await one(store, Get("a"))).value == b"x" * 2**21


async def test_without_the_option_a_large_value_is_refused_with_both_sizes(server: Server) -> None:
    async with opened(server) as store:
        error = (await one(store, Set("a", bytes(2**20 + 1)))).error()
        assert isinstance(error, CacheCapacityError)
        assert error.size == 2**20 + 1
        assert error.limit == store.capabilities.max_value_bytes


async def test_a_chunk_that_is_missing_or_foreign_makes_a_miss(server: Server) -> None:
    for spoil in ("delete", "set"):
        async with opened(server, namespace="chunks", chunked=True) as store:
            await one(store, Set("a", bytes(3 * 2**20)))
            manifest = (await raw(server, "get", name_of(store, "a")))[HEADER.size :]
            head, _, _ = name_of(store, "a").rpartition(":")
            chunks = [head + tail for tail in chunk_tails(manifest)]
            assert len(chunks) == 4
            name = chunks[1]
            assert len(await raw(server, "get", name)) > 1_000_000
            await raw(server, spoil, name, *([b"other bytes"] if spoil == "set" else []))
            assert await one(store, Get("a")) == Missing()
            await one(store, Set("a", bytes(3 * 2**20)))
            assert isinstance(await one(store, Get("a")), Found)
            await one(store, Delete("a"))


async def test_touching_a_large_value_gives_its_chunks_the_new_time(server: Server) -> None:
    async with opened(server, chunked=True) as store:
        stored = await one(store, Set("a", bytes(2 * 2**20), ttl=1.0))
        touched = await one(store, Touch("a", 60.0))
        assert touched.version == stored.version
        assert touched.ttl == pytest.approx(60.0, abs=0.1)
        with anyio.fail_after(30):
            await one(store, Set("sign", b"", ttl=3.0))
            while isinstance(await one(store, Exists("sign")), Present):
                await anyio.sleep(0.1)
        assert len((await one(store, Get("a"))).value) == 2 * 2**20


async def test_removing_a_large_value_removes_its_chunks() -> None:
    with run_memcached() as server:
        async with opened(server, chunked=True) as store:
            await one(store, Set("a", bytes(3 * 2**20)))
            assert (await raw(server, "stats"))[b"curr_items"] == 6  # The generation, the manifest and four chunks
            assert await one(store, Delete("a")) == Deleted(1)
            assert (await raw(server, "stats"))[b"curr_items"] == 1


async def test_more_than_there_may_be_in_chunks_is_refused(server: Server) -> None:
    async with opened(server, chunked=True) as store:
        limit = store.capabilities.max_value_bytes
        assert limit == 64 * 2**20
        reply = await one(store, Set("a", bytes(limit + 1)))
        assert isinstance(reply, Failed)
        assert isinstance(reply.error(), CacheCapacityError)
