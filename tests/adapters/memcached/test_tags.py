"""Tags in a real Memcached: the generations stored with the entries, and the effect of losing them."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from anyio import to_thread

from cachebus import CacheInvalidationError, CacheKeyError, open_cache
from cachebus.adapters.memcached.keys import ALL_TAGS
from cachebus.adapters.memcached.session import REMEMBERED_KEYS, REMEMBERED_TAGS, TagMemory
from cachebus.adapters.memcached.store import MemcachedStore
from cachebus.messages import (
    Add,
    CompareAndSet,
    Delete,
    Deleted,
    Exists,
    Failed,
    Found,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    Incremented,
    Invalidated,
    InvalidateTags,
    LeaseGranted,
    LoadMetadata,
    Missing,
    NotStored,
    Present,
    Set,
    SetMany,
    Stale,
    Stored,
    Touch,
)
from cachebus.testing.servers import Server, run_memcached
from cachebus.testing.suite.base import granted

from .conftest import count_trips, one, opened, raw


def tag_name(store: MemcachedStore, tag: str | None) -> str:
    """Return the name of a tag's generation on the first server; `None` means all tags."""
    connection = next(iter(store._servers.values())).connection
    assert connection is not None
    assert connection.generation is not None
    return store._keys.head(connection.generation) + (ALL_TAGS if tag is None else store._keys.tag(tag))


# Cost


async def test_a_tagged_hit_is_one_round_trip_once_the_tags_are_known(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace = uuid4().hex
    async with opened(server, namespace=namespace) as writer, opened(server, namespace=namespace) as store:
        await one(writer, SetMany({f"k{number}": number for number in range(50)}, tags=("a", "b")))
        await one(writer, Set("bare", 1))
        sent = count_trips(store, monkeypatch)
        assert (await one(store, Get("k1"))).tags == ("a", "b")
        assert len(sent) == 2 + 1  # The store did not know the namespace's generation either.
        for request in (Get("k1"), GetMany(("k1", "bare")), Exists("k1")):
            sent.clear()
            assert not isinstance(await one(store, request), Missing)
            assert len(sent) == 1
        sent.clear()
        await store.execute([Get(f"k{number}") for number in range(50)])
        sent.clear()
        replies: Any = await store.execute([Get(f"k{number}") for number in range(50)])
        assert [reply.value for reply in replies] == list(range(50))
        assert len(sent) == 1
        assert sent[0].count(b"mg ") == 1 + 50 + 2, "the namespace, the keys, and each tag once"


async def test_reading_what_has_no_tags_asks_for_none(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(server) as store:
        await store.execute([Set("tagged", 1, tags=("a",)), Set("bare", 1), Set("freed", 1, tags=("a",))])
        await store.execute([Get("tagged"), Get("freed"), Set("freed", 2)])
        await one(store, Get("freed"))
        sent = count_trips(store, monkeypatch)
        for key in ("bare", "freed"):
            sent.clear()
            await one(store, Get(key))
            assert [each.count(b"mg ") for each in sent] == [2], "the namespace and the key"


async def test_invalidating_costs_the_same_for_any_number_of_entries(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(server) as store:
        sent = count_trips(store, monkeypatch)
        for count in (10, 2000):
            await one(store, SetMany({f"k{number}": number for number in range(count)}, tags=("a",)))
            sent.clear()
            assert await one(store, InvalidateTags(("a",))) == Invalidated()
            assert len(sent) == 1
            found = await one(store, GetMany(tuple(f"k{number}" for number in range(count))))
            assert found.entries == {}


def test_the_memory_of_tags_is_bounded() -> None:
    memory = TagMemory()
    for number in range(REMEMBERED_KEYS + 100):
        memory.note(f"k{number}", ("=a",))
    memory.note("many", ("=a",) * (REMEMBERED_TAGS + 1))
    assert repr(memory) == f"<TagMemory {REMEMBERED_KEYS}/{REMEMBERED_KEYS} keys>"
    assert "k0" not in memory.names
    assert memory.names[f"k{REMEMBERED_KEYS}"] == ("=a",)


async def test_what_was_remembered_wrongly_is_found_out(server: Server) -> None:
    namespace = uuid4().hex
    async with opened(server, namespace=namespace) as reader, opened(server, namespace=namespace) as writer:
        await one(writer, Set("k", 1, tags=("a",)))
        await one(reader, Get("k"))
        await one(writer, Set("k", 2, tags=("b",)))
        assert (await one(reader, Get("k"))).tags == ("b",)
        await one(writer, InvalidateTags(("b",)))
        assert await one(reader, Get("k")) == Missing()


# Entries with an invalidated tag are misses


async def test_nothing_sees_an_entry_whose_tag_was_invalidated(store: MemcachedStore) -> None:
    async def invalid() -> None:
        await store.execute([Set("k", 5, tags=("a", "b")), InvalidateTags(("b",))])

    for request, reply in (
        (Get("k"), Missing()),
        (Exists("k"), Missing()),
        (Touch("k", 60.0), Missing()),
        (Increment("k", initial=None), Missing()),
        (Delete("k"), Deleted(0)),
        (Set("k", 1, only_if="present"), NotStored()),
    ):
        await invalid()
        assert await one(store, request) == reply
    await invalid()
    mine = await one(store, GetOrLease("k", "p", "t", 60.0))
    assert mine == LeaseGranted(mine.token, None)
    await invalid()
    assert isinstance(await one(store, Add("k", 6)), Stored)
    assert (await one(store, Get("k"))).value == 6


async def test_a_good_entry_keeps_its_tags_whatever_is_done_to_it(store: MemcachedStore) -> None:
    await one(store, Set("k", 5, tags=("a", "b", "a")))
    assert (await one(store, Touch("k", 60.0))).ttl == pytest.approx(60.0, abs=0.1)
    assert await one(store, Increment("k")) == Incremented(6)
    found = await one(store, Get("k"))
    assert (found.value, found.tags) == (6, ("a", "b"))
    assert isinstance(await one(store, Exists("k")), Present)
    assert isinstance(await one(store, CompareAndSet("k", 7, found.version, tags=("c",))), Stored)
    assert (await one(store, Get("k"))).tags == ("c",)
    await one(store, InvalidateTags(("a",)))
    assert (await one(store, Get("k"))).value == 7
    assert await one(store, Delete("k")) == Deleted(1)


async def test_a_batch_keeps_its_order_around_an_invalidation(store: MemcachedStore) -> None:
    replies = await store.execute(
        [Set("k", 1, tags=("a",)), Get("k"), InvalidateTags(("a",)), Get("k"), Set("k", 2, tags=("a",)), Get("k")]
    )
    assert [type(reply) for reply in replies] == [Stored, Found, Invalidated, Missing, Stored, Found]


@pytest.mark.parametrize("tag", ["", " ", "a b\r\n", "ü", "x" * 300, "@", "=", "%", "\x00", "a:b", "k" * 200])
async def test_a_tag_may_be_anything(store: MemcachedStore, tag: str) -> None:
    await store.execute([Set("k", 1, tags=(tag,)), Set("other", 1, tags=(tag + "!",))])
    assert (await one(store, Get("k"))).tags == (tag,)
    await one(store, InvalidateTags((tag,)))
    assert await one(store, Get("k")) == Missing()
    assert isinstance(await one(store, Get("other")), Found)


async def test_a_tag_that_is_no_unicode_is_refused_by_itself(store: MemcachedStore) -> None:
    replies: Any = await store.execute([Set("a", 1, tags=("\ud800",)), Set("b", 1, tags=("fine",)), Get("b")])
    assert isinstance(replies[0].error(), CacheKeyError)
    assert isinstance(replies[1], Stored)
    assert isinstance(replies[2], Found)
    assert isinstance((await one(store, GetOrLease("c", "p", "t", 60.0, tags=("\ud800",)))).error(), CacheKeyError)
    assert isinstance((await one(store, InvalidateTags(("\ud800",)))).error(), CacheKeyError)


async def test_a_large_value_has_tags_too(server: Server) -> None:
    async with opened(server, chunked=True) as store:
        value = bytes(3 * 2**20)
        await one(store, Set("k", value, tags=("a",)))
        found = await one(store, Get("k"))
        assert (found.value, found.tags) == (value, ("a",))
        await one(store, InvalidateTags(("a",)))
        assert await one(store, Get("k")) == Missing()


# Lost generations


async def test_a_generation_that_is_lost_revives_nothing(server: Server) -> None:
    async with opened(server) as store:
        await store.execute([Set("old", 1, tags=("a",)), InvalidateTags(("a",)), Set("new", 2, tags=("a",))])
        await raw(server, "delete", tag_name(store, "a"))
        assert (await one(store, GetMany(("old", "new")))).entries == {}
        await one(store, Set("newer", 3, tags=("a",)))
        found = await one(store, GetMany(("old", "new", "newer")))
        assert {key: each.value for key, each in found.entries.items()} == {"newer": 3}


async def test_an_invalidation_makes_no_generation_that_nobody_has(server: Server) -> None:
    async with opened(server) as store:
        await one(store, InvalidateTags(("nobody", "has")))
        for tag in ("nobody", "has", None):
            assert await raw(server, "get", tag_name(store, tag)) is None


async def test_what_stands_there_for_a_generation_is_none_if_it_is_too_large(server: Server) -> None:
    async with opened(server) as store:
        await one(store, Set("k", 1, tags=("a",)))
        await raw(server, "set", tag_name(store, "a"), bytes(1000))
        assert await one(store, Get("k")) == Missing()
        assert isinstance(await one(store, Set("k", 1, tags=("a",))), Failed)
        await one(store, InvalidateTags(("a",)))
        assert isinstance(await one(store, Set("k", 1, tags=("a",))), Stored)


async def test_a_restart_revives_nothing() -> None:
    with run_memcached() as server:
        async with opened(server, timeout=0.5, connect_timeout=0.5) as store:
            await store.execute([Set("k", 1, tags=("a",)), InvalidateTags(("a",))])
            token = await granted(store, GetOrLease("l", "p", "t", 60.0))
            await to_thread.run_sync(server.restart)
            while isinstance(await one(store, Get("k")), Failed):
                pass
            assert await one(store, Get("k")) == Missing()
            lost = await one(store, Set("l", 1, tags=("a",), lease=token))
            assert (type(lost), lost.reason) == (NotStored, "lease_lost")


async def test_an_invalidation_that_a_server_missed_is_an_error() -> None:
    with run_memcached() as server, run_memcached() as other:
        url = f"memcached://{server.host}:{server.port},{other.host}:{other.port}?timeout=0.3&connect_timeout=0.3"
        async with open_cache(url, on_error="miss", timeout=1.0) as cache:
            for number in range(20):
                await cache.set(f"k{number}", number, tags=["a"])
            await to_thread.run_sync(other.pause)
            with pytest.raises(CacheInvalidationError):
                await cache.invalidate_tags("a")
            await to_thread.run_sync(other.resume)
            while True:
                try:
                    await cache.invalidate_tags("a")
                except CacheInvalidationError:
                    continue
                break
            assert await cache.get_many([f"k{number}" for number in range(20)]) == {}


# Stale values


async def test_what_was_invalidated_is_not_served_stale(store: MemcachedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    async def expired(key: str) -> None:
        token = await granted(store, GetOrLease(key, "p", f"{key}1", 60.0, tags=("a",)))
        await one(store, Set(key, b"old", 1.0, ("a",), lease=token, metadata=LoadMetadata(0.1, 60.0)))

    await expired("k")
    await expired("l")
    connection: Any = next(iter(store._servers.values())).connection
    monkeypatch.setattr(connection, "_offset", connection._offset + 1.5)
    mine = await one(store, GetOrLease("k", "p", "k2", 60.0))
    assert (mine.stale.value, mine.stale.tags) == (b"old", ("a",))
    told = await one(store, GetOrLease("k", "q", "k3", 60.0))
    assert isinstance(told, Stale)
    await one(store, InvalidateTags(("a",)))
    in_its_own_place = await one(store, GetOrLease("l", "p", "l2", 60.0))
    assert isinstance(in_its_own_place, LeaseGranted)
    assert in_its_own_place.stale is None
    assert (await one(store, GetOrLease("k", "q", "k4", 60.0))).token == mine.token, (
        "the stale value is kept in the lease"
    )
    assert not isinstance(await one(store, GetOrLease("k", "q", "k5", 60.0)), Stale)
