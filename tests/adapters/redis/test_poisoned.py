"""A key with unreadable bytes is an error or a miss, and does not affect its batch or its connection."""

from __future__ import annotations

import asyncio
import struct
import time
from typing import Any

import pytest

from cachebus import open_cache
from cachebus.messages import Delete, Failed, Found, Get, GetMany, GetOrLease, LeaseGranted, Missing, Set
from cachebus.testing.servers import Server

from .conftest import one, opened

FAR = (time.time() + 1e6) * 1000
TOKEN = b"\xff" * 20

POISON = {
    "a value of an unknown form": struct.pack(">dd", 1e15, 0) + b"?" + b"x",
    "msgpack that only tag_stamps": struct.pack(">dd", 1e15, 0) + b"M" + b"\xdc\xff\xff" * 22_000,
    "metadata that is none": struct.pack(">dd", 1e15, 0) + b"o\xff\xff" + b"x",
    "metadata of a wrong type": struct.pack(">dd", 1e15, 0) + b"o\x00\x01\xc0" + b"Bx",
    "metadata of other types": struct.pack(">dd", 1e15, 0) + b"o\x00\x05\x94\xa1a\xc3\xc3\x90" + b"Bx",
    "tags that are none": struct.pack(">dd", 1e15, 0) + b"t\xff\xff\xff\xff" + b"x" * 20,
    "tags of a wrong type": struct.pack(">dd", 1e15, 0) + b"t\x00\x00\x00\x01" + b"x" * 16 + b"\x05" + b"Bx",
    "tags within tags": struct.pack(">dd", 1e15, 0) + b"t\x00\x00\x00\x01" + b"x" * 16 + b"\x90" + b"t",
    "a value that is cut short": b"\x00" * 7,
    "a lease whose token is not UTF-8": b"".join(
        (struct.pack(">dd", -1.0, FAR), b"l", struct.pack(">d", 0), bytes((len(TOKEN),)), TOKEN, bytes(16), bytes(4))
    ),
    "a lease whose stale value is damaged": b"".join(
        (struct.pack(">dd", -1.0, FAR), b"l", struct.pack(">d", FAR), b"\x04true", bytes(16), bytes(4), b"junk" * 5)
    ),
}


@pytest.fixture(params=list(POISON))
async def poisoned(request: Any, server: Server) -> Any:
    async with opened(server.url) as store:
        connection = await store._pool.connect()
        await connection.call("FLUSHALL")
        await connection.call("SET", "tests:bad", POISON[request.param])
        await one(store, Set("good", b"here"))
        yield store


async def test_its_batch_and_its_connection_go_on(poisoned: Any) -> None:
    connection = poisoned._pool.main
    for bad in (Get("bad"), GetMany(("bad", "good")), GetOrLease("bad", "me", "call", 5.0)):
        batch = [Get("good"), bad, Get("good"), GetMany(("good",)), Set("other", b"1"), Get("other")]
        replies = await asyncio.wait_for(poisoned.execute(batch), 10.0)
        assert [type(reply) for reply in (replies[0], replies[2], replies[5])] == [Found] * 3
        assert replies[3].entries["good"].value == b"here"
    assert poisoned._pool.main is connection
    assert connection.lost is None


async def test_alone_it_is_a_failure_or_a_miss(poisoned: Any) -> None:
    assert isinstance(await one(poisoned, Get("bad")), Failed | Missing)


async def test_callers_beside_it_see_nothing_of_it_and_the_key_can_be_loaded(poisoned: Any, server: Server) -> None:
    async with open_cache(server.url, namespace="tests") as cache:

        async def load() -> bytes:
            return b"loaded"

        await cache.set("good", b"fine")
        asked = [cache.get("good") for _ in range(20)] + [cache.get("bad")]
        results = await asyncio.wait_for(asyncio.gather(*asked), 10.0)
        assert results == [b"fine"] * 20 + [None]
        await cache.delete("bad")
        assert await cache.get_or_load("bad", load) == b"loaded"


async def test_a_lease_is_granted_after_a_delete(poisoned: Any) -> None:

    await one(poisoned, Delete("bad"))
    assert isinstance(await one(poisoned, GetOrLease("bad", "me", "call", 5.0)), LeaseGranted)
