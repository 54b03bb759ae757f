"""Leases in a real Memcached: storage details that the conformance suite does not cover."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import anyio
import pytest

from cachebus.adapters.memcached.connection import Connection
from cachebus.adapters.memcached.store import MemcachedStore
from cachebus.messages import (
    BadMessage,
    Clear,
    Delete,
    Found,
    Get,
    GetOrLease,
    Increment,
    InvalidateTags,
    LeaseGranted,
    Loading,
    LoadMetadata,
    Missing,
    NotHeld,
    NotStored,
    Released,
    ReleaseLease,
    Renewed,
    RenewLease,
    Set,
    Stored,
    Touch,
)
from cachebus.testing.servers import Server, run_memcached
from cachebus.testing.suite.base import granted, value_of

from .conftest import count_trips, name_of, one, opened, raw

LONG = 60.0


def lease(token: str, *, key: str = "k", ttl: float = LONG, **more: Any) -> GetOrLease:
    return GetOrLease(key, f"owner of {token}", token, ttl, **more)


def commit(token: str, value: Any, *, key: str = "k", tags: tuple[str, ...] = (), **more: Any) -> Set:
    return Set(key, value, LONG, tags, lease=token, **more)


def is_lost(reply: Any) -> bool:
    return isinstance(reply, NotStored) and reply.reason == "lease_lost"


def connection_of(store: MemcachedStore) -> Connection:
    connection = next(iter(store._servers.values())).connection
    assert connection is not None
    return connection


# Tags


async def test_a_tag_that_was_known_voids_the_lease_for_those_who_come(store: MemcachedStore) -> None:
    t1 = await granted(store, lease("t1", tags=("a", "b")))
    assert isinstance(await one(store, lease("t2")), Loading)
    await one(store, InvalidateTags(("b",)))
    assert await one(store, RenewLease("k", t1, LONG)) == NotHeld()
    t3 = await granted(store, lease("t3"))
    assert is_lost(await one(store, commit(t1, 1, tags=("a", "b"))))
    assert isinstance(await one(store, commit(t3, 2)), Stored)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("refresh", [True, False])
async def test_a_tag_that_is_invalidated_during_the_load_keeps_the_value_out(
    store: MemcachedStore, declared: bool, refresh: bool
) -> None:
    if refresh:
        await one(store, Set("k", b"old", LONG))
    await one(store, Set("other", 1, tags=("a",)))
    t1 = await granted(store, lease("t1", tags=("a",) if declared else (), refresh=refresh))
    await one(store, InvalidateTags(("a",)))
    assert is_lost(await one(store, commit(t1, b"new", tags=("a",))))
    found = await one(store, Get("k"))
    assert found.value == b"old" if refresh else found == Missing()
    assert isinstance(await one(store, lease("t2", refresh=refresh)), LeaseGranted), "the next caller may load at once"


async def test_another_tags_invalidation_only_matters_where_tags_come_late(store: MemcachedStore) -> None:
    for declared, outcome in ((("a",), Stored), ((), NotStored)):
        await one(store, Delete("k"))
        token = await granted(store, lease("t" + str(len(declared)), tags=declared))
        await one(store, InvalidateTags(("quite another",)))
        assert isinstance(await one(store, commit(token, 1, tags=("a",))), outcome)


async def test_a_value_is_stored_with_the_generations_of_its_grant(store: MemcachedStore) -> None:
    t1 = await granted(store, lease("t1", tags=("a",)))
    assert isinstance(await one(store, commit(t1, 1, tags=("a", "late"))), Stored)
    found = await one(store, Get("k"))
    assert (found.value, found.tags) == (1, ("a", "late"))
    await one(store, InvalidateTags(("late",)))
    assert await one(store, Get("k")) == Missing()


# Repeated requests


async def test_a_lease_that_is_asked_for_twice_keeps_the_terms_of_the_first_time(store: MemcachedStore) -> None:
    first = await granted(store, lease("t1", tags=("a",)))
    await one(store, InvalidateTags(("other",)))
    assert await granted(store, lease("t1", tags=("a",))) == first
    await one(store, InvalidateTags(("a",)))
    second = await granted(store, lease("t1", tags=("a",)))
    assert second != first
    # Its load may have begun before the invalidation.
    assert is_lost(await one(store, commit(first, 1, tags=("a",))))
    assert isinstance(await one(store, commit(second, 2, tags=("a",))), Stored)


@pytest.mark.parametrize("refresh", [True, False])
async def test_a_lease_that_is_put_back_when_all_is_over_stores_nothing(server: Server, refresh: bool) -> None:
    namespace = uuid4().hex
    async with opened(server, namespace=namespace) as store, opened(server, namespace=namespace) as other:
        await one(store, Set("k", b"old", LONG)) if refresh else None
        first = await granted(store, lease("t1", refresh=refresh))
        await one(other, Delete("k"))
        await one(other, Set("k", b"changed", LONG)) if refresh else None
        # A delayed repetition of the first request gets a new lease.
        assert await granted(other, lease("t1", refresh=refresh)) != first
        assert is_lost(await one(store, commit(first, b"loaded before")))
        assert (await one(store, Get("k"))) == Missing() or (await one(store, Get("k"))).value == b"changed"


# Time


async def test_clocks_that_differ_cost_a_load_and_never_a_stale_value(server: Server) -> None:
    namespace = uuid4().hex
    async with opened(server, namespace=namespace) as slow, opened(server, namespace=namespace) as fast:
        t1 = await granted(slow, lease("t1", ttl=0.2))
        await one(fast, Get("k"))
        connection_of(fast)._offset += 10.0
        t2 = await granted(fast, lease("t2"))
        assert is_lost(await one(slow, commit(t1, 1)))
        assert isinstance(await one(fast, commit(t2, 2)), Stored)
        connection_of(fast)._offset -= 10.0


async def test_a_lease_that_ran_out_stores_nothing_even_if_nobody_has_it(store: MemcachedStore) -> None:
    t1 = await granted(store, lease("t1", ttl=0.02))
    await anyio.sleep(0.03)
    assert is_lost(await one(store, commit(t1, 1)))
    assert await one(store, Get("k")) == Missing()


async def test_the_server_forgets_a_lease_and_what_is_stale_in_its_time(server: Server) -> None:
    async with opened(server) as store:
        t1 = await granted(store, lease("t1", ttl=15.0))
        assert 15 - SECONDS_LATE <= await left(server, store) <= 16
        await one(store, RenewLease("k", t1, 30.0))
        assert 30 - SECONDS_LATE <= await left(server, store) <= 31
        await one(store, commit(t1, b"v", metadata=LoadMetadata(0.0, 100.0)))
        assert 160 - SECONDS_LATE <= await left(server, store) <= 161
        await one(store, Touch("k", 10.0))
        assert 110 - SECONDS_LATE <= await left(server, store) <= 111
        connection_of(store)._offset += 20.0
        assert (mine := await one(store, lease("t2", ttl=5.0))).stale.value == b"v"
        assert 90 - SECONDS_LATE <= await left(server, store) <= 91
        assert await one(store, ReleaseLease("k", mine.token)) == Released()
        assert 90 - SECONDS_LATE <= await left(server, store) <= 91


SECONDS_LATE = 5
"""Seconds by which the test may read the time to live too late."""


async def left(server: Server, store: MemcachedStore) -> int:
    """Return the time to live that the server reports, in seconds."""
    name = name_of(store, "k")

    def ask() -> bytes:
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(f"mg {name} t\r\n".encode())
            return connection.recv(100)

    answer = await anyio.to_thread.run_sync(ask)
    assert answer.startswith(b"HD t"), answer
    return int(answer[4:])


# Rejected requests


@pytest.mark.parametrize(
    "request_",
    [
        lease("t", ttl=0.0),
        lease("t", ttl=float("inf")),
        lease("t" * 239),
        RenewLease("k", "t1", -1.0),
        commit("t1", 1, only_if="absent"),
    ],
)
async def test_what_makes_no_sense_is_refused(store: MemcachedStore, request_: Any) -> None:
    t1 = await granted(store, lease("t1"))
    assert isinstance((await one(store, request_)).error(), BadMessage)
    assert await one(store, RenewLease("k", t1, LONG)) == Renewed(LONG)


# Large values


async def test_a_large_value_is_stored_under_a_lease_and_served_stale(server: Server) -> None:
    async with opened(server, chunked=True) as store:
        first, second = bytes(3 * 2**20), b"x" * 2**21
        t1 = await granted(store, lease("t1"))
        await one(store, Set("k", first, 1.0, ("a",), lease=t1, metadata=LoadMetadata(0.0, LONG)))
        found = await one(store, lease("t2"))
        assert isinstance(found, Found)
        assert (found.value, found.tags) == (first, ("a",))
        connection_of(store)._offset += 1.5
        mine = await one(store, lease("t3"))
        assert mine.stale.value == first
        assert (await one(store, lease("t4"))).value == first
        assert isinstance(await one(store, commit(mine.token, second)), Stored)
        assert (await one(store, Get("k"))).value == second


async def test_a_large_value_that_comes_late_leaves_everything_as_it_is(server: Server) -> None:
    async with opened(server, chunked=True) as store:
        t1 = await granted(store, lease("t1"))
        await one(store, Set("k", b"newer"))
        assert is_lost(await one(store, commit(t1, bytes(3 * 2**20))))
        assert (await one(store, Get("k"))).value == b"newer"


async def test_a_value_with_a_lost_chunk_is_loaded_again() -> None:
    with run_memcached() as server:
        async with opened(server, chunked=True) as store:
            await one(store, Set("k", bytes(3 * 2**20)))
            # All items except the generation and the manifest.
            for name in await chunk_names(server):
                await raw(server, "delete", name)
            assert await one(store, Get("k")) == Missing()
            t1 = await granted(store, lease("t1"))
            assert isinstance(await one(store, commit(t1, 1)), Stored)


async def chunk_names(server: Server) -> list[str]:
    """Return the names of all chunks on a server."""

    def ask() -> list[str]:
        with socket.create_connection((server.host, server.port)) as connection:
            connection.sendall(b"lru_crawler metadump all\r\n")
            told = b""
            while not told.endswith(b"END\r\n"):
                told += connection.recv(65536)
        names = [unquote(line.split(b" ")[0][4:].decode()) for line in told.splitlines() if line.startswith(b"key=")]
        return [name for name in names if "+" in name]

    return await anyio.to_thread.run_sync(ask)


async def test_a_stale_value_for_which_there_is_no_room_beside_the_lease_goes(server: Server) -> None:
    async with opened(server) as store:
        most = store.capabilities.max_value_bytes
        assert most is not None
        t1 = await granted(store, lease("t1"))
        room = most - 100
        stored = await one(store, Set("k", bytes(room), 1.0, lease=t1, metadata=LoadMetadata(0.0, LONG)))
        assert isinstance(stored, Stored)
        connection_of(store)._offset += 1.5
        t2 = await granted(store, lease("t2", tags=("t" * 200,)))
        assert isinstance(await one(store, commit(t2, b"small")), Stored)


# Batches


async def test_a_batch_of_questions_is_two_round_trips(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(server) as store:
        await one(store, Get("k"))
        sent = count_trips(store, monkeypatch)
        asked = [lease(f"t{number}", key=f"k{number}") for number in range(50)]
        assert all(isinstance(reply, LeaseGranted) for reply in await store.execute(asked))
        assert len(sent) == 2
        sent.clear()
        again = [lease(f"u{number}") for number in range(50)]
        replies = await store.execute(again)
        assert [type(reply) for reply in replies] == [LeaseGranted, *[Loading] * 49], (
            "one lease is granted, and the other requests wait for it"
        )
        assert len(sent) == 3


async def test_two_keys_with_one_hash_take_each_others_leases_and_store_nothing_wrong(server: Server) -> None:
    async with opened(server, hasher=lambda raw: b"x" * 32) as store:
        one_key, other = "a b", "c d"
        t1 = await granted(store, lease("t1", key=one_key))
        t2 = await granted(store, lease("t2", key=other))
        assert is_lost(await one(store, commit(t1, 1, key=one_key)))
        assert isinstance(await one(store, commit(t2, 2, key=other)), Stored)
        assert await one(store, Get(one_key)) == Missing()
        assert (await one(store, Get(other))).value == 2


async def test_what_was_written_by_others_is_no_obstacle(server: Server) -> None:
    async with opened(server) as store:
        await one(store, Get("k"))
        await raw(server, "set", name_of(store, "k"), b"junk")
        t1 = await granted(store, lease("t1"))
        assert isinstance(await one(store, commit(t1, 1)), Stored)


async def test_clear_between_two_requests_of_a_batch_voids_the_lease(store: MemcachedStore) -> None:
    t1 = await granted(store, lease("t1"))
    replies: Any = await store.execute([lease("t1"), Clear(), commit(t1, 1), lease("t2"), Get("k")])
    assert replies[0] == LeaseGranted(t1)
    assert is_lost(replies[2])
    assert isinstance(await one(store, commit(replies[3].token, 2)), Stored)
    assert await value_of(store, "k") == 2


async def test_counting_a_value_that_was_loaded_keeps_its_origin(store: MemcachedStore) -> None:
    t1 = await granted(store, lease("t1"))
    await one(store, commit(t1, 5, metadata=LoadMetadata(0.25, 5.0, "v1")))
    await one(store, Increment("k"))
    found = await one(store, Get("k"))
    assert (found.value, found.etag, found.lifetime) == (6, "v1", LONG)
