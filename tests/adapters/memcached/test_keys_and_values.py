from __future__ import annotations

import struct
import time
from typing import Any

import pytest

from cachebus.adapters.memcached.entry import HEADER, pack_entry, server_expiry
from cachebus.adapters.memcached.keys import Keys, new_generation
from cachebus.messages import (
    CacheCapacityError,
    CacheConfigurationError,
    CacheKeyError,
    CacheSerializationError,
    Delete,
    Deleted,
    Exists,
    Found,
    FoundMany,
    Get,
    GetMany,
    Missing,
    Set,
    Stored,
    Touch,
)
from cachebus.testing.servers import Server, run_memcached

from .conftest import name_of, one, opened, raw

DAY = 86_400.0


# Keys


@pytest.mark.parametrize(
    "key",
    ["a b", "a\r\nset x 0 0 1\r\ny\r\n", "\x00", "\x7f", "k" * 10_000, "ключ", "😀", "k" * 250, " ", "\t"],
)
async def test_nothing_raw_reaches_the_wire(server: Server, key: str) -> None:
    async with opened(server, namespace="rawness") as store:
        await one(store, Set(key, b"1"))
        assert (await one(store, Get(key))).value == b"1"
        name = name_of(store, key)
        assert await raw(server, "get", name) is not None
        head, mark, digest = name.partition("#")
        assert (mark, len(digest)) == ("#", 64)
        assert len(name) <= 250
        assert head.startswith("rawness:")
        assert await one(store, Delete(key)) == Deleted(1)


async def test_a_key_stands_as_it_is_up_to_the_last_byte_that_there_is_room_for(server: Server) -> None:
    async with opened(server, namespace="room") as store:
        longest = 250 - len("room:") - 17 - 1
        for length, mark in ((longest, ":k"), (longest + 1, "#")):
            await one(store, Set("k" * length, b"1"))
            name = name_of(store, "k" * length)
            assert await raw(server, "get", name) is not None
            assert mark in name.partition(":")[2]
            assert len(name) <= 250
            await one(store, Delete("k" * length))


async def test_two_keys_with_one_hash_are_never_taken_for_each_other(server: Server) -> None:
    async with opened(server, hasher=lambda raw: b"\x07" * 32) as store:
        first, second, plain = "first key", "second key", "plain"
        await one(store, Set(first, b"1"))
        await one(store, Set(plain, b"3"))
        assert await one(store, Get(second)) == Missing()
        assert await one(store, Exists(second)) == Missing()
        assert await one(store, Touch(second)) == Missing()
        assert await one(store, GetMany((first, second))) == FoundMany({first: await one(store, Get(first))})
        assert isinstance(await one(store, Set(second, b"2", only_if="absent")), Stored)
        assert await one(store, Get(first)) == Missing()
        assert (await one(store, Get(second))).value == b"2"
        assert (await one(store, Get(plain))).value == b"3"


async def test_two_keys_with_one_hash_in_one_batch_both_get_their_turn(server: Server) -> None:
    async with opened(server, hasher=lambda raw: b"\x08" * 32) as store:
        replies = await store.execute([Set("a b", b"1", only_if="absent"), Set("c d", b"2", only_if="absent")])
        assert [type(reply) for reply in replies] == [Stored, Stored]
        assert await one(store, Get("a b")) == Missing()
        assert (await one(store, Get("c d"))).value == b"2"


async def test_a_surrogate_is_refused_by_itself(server: Server) -> None:
    async with opened(server) as store:
        bad, good, many = await store.execute([Get("\ud800"), Set("a", b"1"), GetMany(("a", "\ud800"))])
        assert isinstance(bad.error(), CacheKeyError)  # type: ignore[attr-defined]
        assert isinstance(good, Stored)
        assert isinstance(many.error(), CacheKeyError)  # type: ignore[attr-defined]


@pytest.mark.parametrize("namespace", ["", "a:b", "a b", "n" * 65, "ключ", "a\r\n"])
def test_a_namespace_that_could_be_taken_for_another_is_refused(namespace: str) -> None:
    with pytest.raises(CacheConfigurationError, match="namespace"):
        Keys(namespace)


def test_no_two_namespaces_and_keys_share_a_name() -> None:
    generation = new_generation(time.time())
    made = {
        Keys(namespace).head(generation) + Keys(namespace).tail(key)[0]
        for namespace in ("a", "a-b", "a_b", "ab")
        for key in ("b:c", "c", ":c", "b#c", "#c", "+c+0", "b", "-b", "a b")
    }
    assert len(made) == 4 * 9


def test_a_generation_never_comes_back_when_the_clock_stands_still() -> None:
    made = {new_generation(1_000_000.0) for _ in range(100)}
    assert len(made) > 90
    assert {len(each) for each in made} == {17}


# Values


def test_the_layout_of_an_entry_is_this_for_ever() -> None:
    packed = pack_entry(b"Bvalue", b"a key", 1_700_000_060.5, 1_700_000_000.25, 42.0)
    assert packed.hex() == ("42000541d954fc4f20000041d954fc401000004045000000000000" + b"a key".hex() + b"value".hex())
    assert HEADER.size == struct.calcsize(">cHddd") == 27


async def test_what_is_on_the_server_is_that_layout(server: Server) -> None:
    async with opened(server, namespace="layout") as store:
        before = time.time()
        await one(store, Set("a b", "text", ttl=1.5))
        item = await raw(server, "get", name_of(store, "a b"))
        form, size, expiry, stored_at, version = HEADER.unpack_from(item)
        assert (form, size, version) == (b"M", 3, 0.0)
        assert item[HEADER.size :] == b"a b" + b"\xa4text"
        assert stored_at == pytest.approx(before, abs=5.0)
        assert expiry == pytest.approx(stored_at + 2.0, abs=0.1)


async def test_what_others_wrote_is_an_error_and_is_written_over(server: Server) -> None:
    async with opened(server, namespace="foreign") as store:
        await one(store, Set("a", b"1"))
        name = name_of(store, "a")
        for foreign in (b"", b"5", b"?" * 100, HEADER.pack(b"M", 0, 0.0, 1.0, 0.0) + b"\xc1"):
            await raw(server, "set", name, foreign)
            told = await one(store, Get("a"))
            # Bytes that parse as the entry of another key are a miss.
            assert told == Missing() if foreign[:1] == b"?" else isinstance(told.error(), CacheSerializationError)
            assert isinstance(await one(store, Set("a", b"2")), Stored)
            assert (await one(store, Get("a"))).value == b"2"


async def test_a_value_fits_to_the_last_byte_and_one_more_is_refused_with_both_sizes(server: Server) -> None:
    async with opened(server) as store:
        limit = store.capabilities.max_value_bytes
        assert limit is not None
        assert 1_000_000 < limit < 2**20
        # The entry of a hashed key also contains the key, unless it is too long.
        for key, kept in (("k", 0), ("k" * 240, 240), ("k" * 5000, 64)):
            room = limit - kept
            fits, refused, after = await store.execute([Set(key, bytes(room)), Set(key, bytes(room + 1)), Get(key)])
            assert isinstance(fits, Stored)
            error = refused.error()  # type: ignore[attr-defined]
            assert isinstance(error, CacheCapacityError)
            assert (error.size, error.limit) == (room + 1, room)
            assert isinstance(after, Found)
            assert len(after.value) == room


async def test_the_limit_is_the_servers_own() -> None:
    with run_memcached("-I", "4m") as server:
        async with opened(server) as store:
            limit = store.capabilities.max_value_bytes
            assert limit is not None
            assert 4_000_000 < limit < 4 * 2**20
            assert isinstance(await one(store, Set("a", bytes(limit))), Stored)


# Times to live


async def test_forty_days_are_told_as_a_date_and_thirty_as_a_duration(server: Server) -> None:
    now = time.time()
    assert server_expiry(now + 30 * DAY - 1, now) == 30 * 86_400
    assert server_expiry(now + 40 * DAY, now) == pytest.approx(now + 40 * DAY + 1, abs=1.0)
    assert server_expiry(0.0, now) == 0
    assert server_expiry(now + 1e12, now) == 0
    async with opened(server) as store:
        await one(store, Set("a", b"1", ttl=40 * DAY))
        await one(store, Set("b", b"1", ttl=1e12))
        await one(store, Set("c", b"1", ttl=None))
        assert 40 * DAY - 60 < (await one(store, Get("a"))).ttl <= 40 * DAY
        assert (await one(store, Get("b"))).ttl == pytest.approx(1e12, abs=60)
        assert (await one(store, Get("c"))).ttl is None


async def test_a_part_of_a_second_is_rounded_up_and_the_value_then_goes(server: Server) -> None:
    async with opened(server) as store:
        before = time.monotonic()
        await one(store, Set("a", b"1", ttl=0.05))
        seen: Any = await one(store, Get("a"))
        assert 0.5 < seen.ttl <= 1.0
        while isinstance(await one(store, Get("a")), Found):
            pass
        # Memcached's clock counts whole seconds, and is late on a busy machine.
        assert 0.05 < time.monotonic() - before < 2.5
