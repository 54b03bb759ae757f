"""Tags on Redis: their cost, the effect of lost keys, and how long counters are kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import anyio
import pytest

from cachebus import LoadResult, open_cache
from cachebus.adapters.redis.cluster.store import RedisClusterStore, Stamps
from cachebus.adapters.redis.connect import Connector, Endpoint
from cachebus.adapters.redis.entry import NO_STAMP, TagSpace
from cachebus.adapters.redis.scripts import RETENTION_MS
from cachebus.messages import (
    BadMessage,
    CacheConfigurationError,
    CacheConnectionError,
    CacheInvalidationError,
    Clear,
    Cleared,
    CompareAndSet,
    Found,
    Get,
    GetMany,
    GetOrLease,
    Invalidated,
    InvalidateTags,
    Missing,
    NotStored,
    Set,
    SetMany,
    Stored,
    TagsInvalidated,
    Touch,
)
from cachebus.testing.servers import Server, redis_command, run_redis_cluster
from cachebus.testing.suite.base import granted

from .conftest import one, opened
from .schedule import Gate
from .test_pipelining import call_server, calls

MINUTE = 60_000


def counter(tag: str) -> str:
    return f"tests#tags:{{tests}}:{tag}"


SEQUENCE = "tests#tags:{tests}"


@pytest.fixture(autouse=True)
async def nothing_of_before(server: Server) -> None:
    await call_server(server, "FLUSHALL")


async def px_of(server: Server, name: str) -> int:
    """Return the time to live of a Redis key in milliseconds: -1 for no expiry, -2 for no key."""
    return int((await call_server(server, "PTTL", name)).strip(":\r\n"))


# Cost


async def test_without_tags_a_read_is_the_command_that_it_was(store: Any, server: Server) -> None:
    await one(store, Set("a", b"1"))
    await call_server(server, "CONFIG", "RESETSTAT")
    await store.execute([Get("a"), Get("b")])
    await one(store, GetMany(("a", "b")))
    assert await calls(server) == {"mget": 2}


async def test_a_tagged_hit_is_one_round_trip(store: Any, server: Server) -> None:
    await one(store, Set("a", b"1", tags=("x", "y")))
    await one(store, Set("b", b"2"))
    await call_server(server, "CONFIG", "RESETSTAT")
    found = await one(store, Get("a"))
    assert (found.value, found.tags) == (b"1", ("x", "y"))
    # The reads inside the script count too: one for the values, and one for each counter.
    assert await calls(server) == {"evalsha": 1, "mget": 1, "get": 2}
    await call_server(server, "CONFIG", "RESETSTAT")
    assert len((await one(store, GetMany(("a", "b", "c")))).entries) == 2
    assert (await calls(server))["evalsha"] == 1


async def test_who_knows_of_no_tags_finds_out_once(store: Any, server: Server) -> None:
    await store.execute([Set("a", b"1", tags=("x",)), Set("b", b"2", tags=("y",))])
    async with opened(server.url) as fresh:
        await call_server(server, "CONFIG", "RESETSTAT")
        values = [found.value for found in await fresh.execute([Get("a"), Get("b")])]
        assert values == [b"1", b"2"]
        assert await calls(server) == {"mget": 2}, "the values, then the counters of both"
        await call_server(server, "CONFIG", "RESETSTAT")
        assert (await one(fresh, Get("a"))).value == b"1"
        assert (await calls(server))["evalsha"] == 1
    async with opened(server.url) as fresh:
        await one(store, InvalidateTags(("x",)))
        assert await fresh.execute([Get("a"), Get("c")]) == [Missing(), Missing()]


async def test_an_invalidation_costs_the_same_whatever_the_number_of_entries(store: Any, server: Server) -> None:
    counted: list[dict[str, int]] = []
    for entries in (10, 5_000):
        for start in range(0, entries, 1000):
            await one(
                store, SetMany({f"k{start + number}": number for number in range(min(entries, 1000))}, tags=("x",))
            )
        await call_server(server, "CONFIG", "RESETSTAT")
        assert await one(store, InvalidateTags(("x", "none"))) == Invalidated()
        counted.append(await calls(server))
        assert (await one(store, GetMany(tuple(f"k{number}" for number in range(entries))))).entries == {}
    assert counted[0] == counted[1]
    assert sum(counted[0].values()) < 10


async def test_storing_many_with_the_same_tags_looks_at_their_counters_no_more_than_once_a_value(
    store: Any, server: Server
) -> None:
    await call_server(server, "CONFIG", "RESETSTAT")
    await one(store, SetMany({f"k{number}": number for number in range(100)}, ttl=60.0, tags=("x", "y")))
    used = await calls(server)
    assert used["evalsha"] == 1
    assert used["get"] <= 200


# Lost keys


@pytest.mark.parametrize("lost", ["the counter", "the sequence and the counter", "everything"])
async def test_what_is_lost_brings_nothing_back(store: Any, server: Server, lost: str) -> None:
    await store.execute([Set("a", b"1", tags=("x",)), InvalidateTags(("x",)), Set("b", b"2", tags=("x",))])
    raws = {key: await told_raw(server, f"tests:{key}") for key in ("a", "b")}
    match lost:
        case "the counter":
            await call_server(server, "DEL", counter("x"))
        case "the sequence and the counter":
            await call_server(server, "DEL", counter("x"), SEQUENCE)
        case _:
            await call_server(server, "FLUSHALL")
            # Restore the entries, as if they had outlived their counters.
            for key, raw in raws.items():
                await anyio.to_thread.run_sync(set_raw, server, f"tests:{key}", raw)
    assert await store.execute([Get("a"), Get("b")]) == [Missing(), Missing()]
    await one(store, Set("c", b"3", tags=("x",)))
    assert isinstance(await one(store, Get("a")), Missing)
    assert (await one(store, Get("c"))).value == b"3"
    await one(store, InvalidateTags(("x",)))
    assert await store.execute([Get("a"), Get("b"), Get("c")]) == [Missing()] * 3


@pytest.mark.parametrize("lost", ["the counter", "the sequence", "both"])
async def test_a_load_during_which_counters_are_lost_stores_nothing_that_may_be_out_of_date(
    store: Any, server: Server, lost: str
) -> None:
    await one(store, Set("a", b"1", tags=("x",)))
    t1 = await granted(store, GetOrLease("k", "p", "t1", 60.0, tags=("x",)))
    await one(store, InvalidateTags(("x",)))
    names = {"the counter": [counter("x")], "the sequence": [SEQUENCE]}.get(lost, [counter("x"), SEQUENCE])
    await call_server(server, "DEL", *names)
    refused = await one(store, Set("k", b"out of date", tags=("x",), lease=t1))
    assert isinstance(refused, NotStored)
    t2 = await granted(store, GetOrLease("k", "p", "t2", 60.0, tags=("x",)))
    assert isinstance(await one(store, Set("k", b"new", tags=("x",), lease=t2)), Stored)
    assert (await one(store, Get("k"))).value == b"new"


async def test_the_invalidation_of_a_tag_that_nothing_has_leaves_no_key(store: Any, server: Server) -> None:
    await one(store, InvalidateTags(tuple(f"t{number}" for number in range(1000))))
    assert (await call_server(server, "DBSIZE")).strip() == ":1"
    assert int((await call_server(server, "STRLEN", SEQUENCE)).strip(":\r\n")) <= 16 + 8 * 256


async def test_a_load_that_names_a_new_tag_at_its_end_is_stored_whatever_else_was_invalidated(store: Any) -> None:
    t1 = await granted(store, GetOrLease("k", "p", "t1", 60.0))
    await one(store, InvalidateTags(("other",)))
    assert isinstance(await one(store, Set("k", b"v", tags=("new",), lease=t1)), Stored)
    assert (await one(store, Get("k"))).value == b"v"
    t2 = await granted(store, GetOrLease("j", "p", "t2", 60.0))
    await one(store, InvalidateTags(("newer",)))
    assert isinstance(await one(store, Set("j", b"v", tags=("newer",), lease=t2)), NotStored)


# Retention of counters


async def test_a_counter_is_kept_for_as_long_as_the_longest_entry(store: Any, server: Server) -> None:
    await one(store, Set("a", b"1", ttl=3600.0, tags=("x",)))
    long = await px_of(server, counter("x"))
    assert 60 * MINUTE < long <= 60 * MINUTE + RETENTION_MS
    await one(store, Set("b", b"1", ttl=1.0, tags=("x",)))
    assert await px_of(server, counter("x")) > 60 * MINUTE, "never shortened"
    await one(store, Set("c", b"1", ttl=7200.0, tags=("x",)))
    assert await px_of(server, counter("x")) > 120 * MINUTE
    await one(store, Touch("a", 10 * 3600.0))
    assert await px_of(server, counter("x")) > 600 * MINUTE
    await one(store, Set("a", b"1", ttl=None, tags=("x",)))
    assert await px_of(server, counter("x")) == -1
    await one(store, Set("a", b"1", ttl=1.0, tags=("x",)))
    assert await px_of(server, counter("x")) == -1
    await one(store, InvalidateTags(("x",)))
    assert 0 < await px_of(server, counter("x")) <= RETENTION_MS, "no older entry needs it any more"
    assert await px_of(server, SEQUENCE) == -1


async def test_touch_for_ever_keeps_the_counter_for_ever(store: Any, server: Server) -> None:
    await one(store, Set("a", b"1", ttl=10.0, tags=("x",)))
    await one(store, Touch("a", None))
    assert await px_of(server, counter("x")) == -1


# Through a cache


async def test_tags_through_two_caches_and_their_events(server: Server) -> None:
    async with open_cache(server.url) as cache, open_cache(server.url) as other:
        async with cache.events(TagsInvalidated) as events:
            assert await cache.get_or_load("k", lambda: LoadResult(1, tags=["late"]), tags=["red"], ttl=60) == 1
            found: Any = await other.lookup("k")
            assert found.tags == ("red", "late")
            await cache.invalidate_tags("late")
            told_of: Any = await anext(events)
            assert told_of.tags == ("late",)
        assert await other.get("k") is None
        assert await other.get_or_load("k", lambda: 2, tags=["red"]) == 2
        await other.set_many({"a": 1, "b": 2}, tags=["red", "blue"])
        await cache.invalidate_tags("red")
        assert await other.get_many(["a", "b", "k"]) == {}


async def test_an_invalidation_from_another_process_voids_a_load(server: Server) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def load() -> LoadResult:
        begun.set()
        await may_end.wait()
        return LoadResult("old", tags=["late"])

    for tag in ("red", "late"):
        begun.clear()
        may_end.clear()
        async with open_cache(server.url) as cache, open_cache(server.url) as other:
            loading = asyncio.create_task(cache.get_or_load("k", load, tags=["red"], ttl=60))
            await begun.wait()
            await other.invalidate_tags(tag)
            may_end.set()
            assert await loading == "old"
            assert await cache.get("k") is None
            assert await other.get_or_load("k", lambda: "new", tags=["red"]) == "new"
            await other.delete("k")


async def test_a_tag_that_is_no_valid_unicode_is_refused_and_the_rest_is_done(store: Any) -> None:
    bad = "\ud800"
    batch = [
        Set("a", b"1", tags=(bad,)),
        InvalidateTags((bad,)),
        GetOrLease("k", "p", "t", 9.0, tags=(bad,)),
        Set("b", b"2"),
    ]
    *refused, stored = await store.execute(batch)
    assert all(isinstance(reply.error(), BadMessage) for reply in refused)
    assert isinstance(stored, Stored)


async def test_damaged_tags_are_no_value(store: Any, server: Server) -> None:
    await one(store, Set("a", b"1", tags=("x",)))
    raw = await told_raw(server, "tests:a")
    for damaged in (raw[:17], raw[:20], raw[:30], raw[:18] + b"\xff" + raw[19:], raw[:39] + b"\xc1" + raw[40:]):
        await anyio.to_thread.run_sync(set_raw, server, "tests:a", damaged)
        assert not isinstance(await one(store, Get("a")), Found)
        async with opened(server.url) as fresh:
            assert not isinstance(await one(fresh, Get("a")), Found)
        assert isinstance(await one(store, Set("a", b"new", only_if="absent")), Stored)
        assert (await one(store, Get("a"))).value == b"new"


# In a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sequence[Server]]:
    with run_redis_cluster() as servers:
        yield servers


@pytest.fixture
async def spread(cluster: Sequence[Server]) -> AsyncIterator[Any]:
    places = [Endpoint(host=server.host, port=server.port) for server in cluster]
    store = RedisClusterStore(places, Connector(health_interval=None), namespace="tests")
    await store.open()
    for server in cluster:
        await call_server(server, "FLUSHALL")
    yield store
    await store.close()


async def trips(store: Any, request: Any) -> tuple[Any, list[int]]:
    """Send a request. Return its reply, and the number of messages in each round trip."""
    with Gate() as gate:
        gate.open = False
        asked = asyncio.create_task(one(store, request))
        sent: list[int] = []
        while not asked.done():
            for _ in range(20):
                await asyncio.sleep(0)
            if together := sum(map(len, gate.waiting.values())):
                sent.append(together)
                for _ in range(together):
                    await gate.step()
        gate.open = True
        return await asked, sent


async def test_in_a_cluster_a_tagged_hit_is_one_round_trip_once_the_tags_are_known(spread: Any) -> None:
    await one(spread, Set("a", b"1", tags=("x",)))
    found, first = await trips(spread, Get("a"))
    assert (found.value, first) == (b"1", [1, 1])
    found, second = await trips(spread, Get("a"))
    assert found.value == b"1"
    assert second in ([1], [2]), "the value and the counter, on one server or on two"
    await one(spread, InvalidateTags(("x",)))
    missing, third = await trips(spread, Get("a"))
    assert (missing, len(third)) == (Missing(), 1)
    await one(spread, Set("a", b"2", tags=("y",)))
    found, changed = await trips(spread, Get("a"))
    assert (found.value, len(changed)) == (b"2", 2)


async def test_in_a_cluster_untagged_requests_are_as_they_were(spread: Any) -> None:
    requests = (Set("a", b"1"), Get("a"), GetOrLease("a", "p", "t", 9.0))
    await spread.execute(requests)  # Connects to the servers and loads the scripts.
    for request in requests:
        _, sent = await trips(spread, request)
        assert len(sent) == 1, request


async def test_in_a_cluster_a_condition_on_a_tagged_value_is_judged_and_then_written(spread: Any) -> None:
    first = await one(spread, Set("a", b"1", tags=("x",)))
    await one(spread, Set("b", b"1", tags=("y",)))
    assert await one(spread, CompareAndSet("a", b"2", 1.0)) == NotStored(first.version)
    second = await one(spread, CompareAndSet("a", b"2", first.version, tags=("x",)))
    assert isinstance(second, Stored)
    await one(spread, InvalidateTags(("x",)))
    assert await one(spread, CompareAndSet("a", b"3", second.version)) == NotStored(0.0)
    assert (await one(spread, Get("b"))).value == b"1"


async def test_in_a_cluster_a_lease_without_tags_does_not_need_the_counters() -> None:
    space = TagSpace("tests", here=False, seen=True)
    stamps = Stamps([GetOrLease("k", "p", "t", 9.0), Set("a", 1, tags=("x",)), Get("b")], space, None)
    error = CacheConnectionError("away", "redis")
    for command in stamps.commands:
        command.fail(error)
    assert stamps.by_position == {0: NO_STAMP, 1: error}


async def test_a_namespace_whose_counters_would_be_all_over_the_cluster_is_refused() -> None:
    with pytest.raises(CacheConfigurationError, match="no colon or"):
        RedisClusterStore([Endpoint("localhost")], namespace="a{}")


async def told_raw(server: Server, name: str) -> bytes:
    answer = await anyio.to_thread.run_sync(redis_command, server, "GET", name)
    return answer.partition(b"\r\n")[2][:-2]


def set_raw(server: Server, name: str, raw: bytes) -> None:
    import socket

    with socket.create_connection((server.host, server.port), timeout=5.0) as connection:
        words = (b"SET", name.encode(), raw)
        connection.sendall(b"*3\r\n" + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words))
        assert connection.recv(64) == b"+OK\r\n"


# Clearing


async def test_a_clear_whose_caller_gave_up_goes_on_to_its_end(server: Server) -> None:
    async with opened(server.url) as store:
        for start in range(0, 20_000, 5_000):
            await one(store, SetMany({f"k{start + number}": number for number in range(5_000)}, tags=("x",)))
        replies: list[Any] = []
        await store.submit([Clear()], replies.append)
        clear = asyncio.create_task(one(store, Clear()))
        await asyncio.sleep(0)
        clear.cancel()
        assert replies == []
    assert replies == [[Cleared()]]
    assert (await call_server(server, "DBSIZE")).strip() == ":2", "the sequence and a counter"


async def test_who_cannot_wait_for_a_clear_is_told_so(server: Server) -> None:
    async with open_cache(server.url) as cache:
        await cache.set_many(dict.fromkeys((f"k{number}" for number in range(20_000)), 1))
    async with open_cache(server.url, timeout=0.002) as cache:
        with pytest.raises(CacheInvalidationError):
            await cache.clear()
