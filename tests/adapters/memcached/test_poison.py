"""A key overwritten by another program is an error or a miss, and affects no other key and no connection."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pymemcache
import pytest

from cachebus.adapters.memcached.entry import HEADER
from cachebus.adapters.memcached.locks import MemcachedLockStore, _Locks
from cachebus.adapters.memcached.store import Endpoint, MemcachedStore
from cachebus.adapters.memcached.values import MANIFEST
from cachebus.messages import (
    AcquireLock,
    Add,
    Admit,
    Admitted,
    CompareAndSet,
    Delete,
    DeleteMany,
    DescribeLock,
    Exists,
    Failed,
    Found,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    LockGranted,
    ReleaseLease,
    RenewLease,
    Request,
    Set,
    SetMany,
    Stored,
    Touch,
)
from cachebus.testing.servers import Server

from .conftest import name_of, one, sync

NAN, INFINITE = float("nan"), float("inf")


def item(
    form: bytes, body: bytes, *, size: int = 0, expiry: float = 0.0, stored: float = 1.0, version: float = 0.0
) -> bytes:
    return HEADER.pack(form, size, expiry, stored, version) + body


def noted(metadata: Any, body: bytes = b"B1") -> bytes:
    packed = metadata if isinstance(metadata, bytes) else msgpack.packb(metadata)
    return item(b"o", struct.pack(">I", len(packed)) + packed + body)


def lease(*fields: Any) -> bytes:
    return item(b"l", msgpack.packb(list(fields)), expiry=1.0)


def manifest(form: bytes, count: int, size: int) -> bytes:
    return item(b"C", MANIFEST.pack(form, b"i" * 16, count, size, b"d" * 16))


DEEP = b"\x91" * 100_000 + b"\xc0"
CLAIMS = b"\xdd\xff\xff\xff\xff"
SOUND: tuple[Any, ...] = ("t1.0000000000000000", 9e12, 0.0, b"", [], b"", ["", ""])

POISON: dict[str, bytes] = {
    "nothing": b"",
    "short": b"B",
    "zeros": bytes(27),
    "noise": bytes(range(256)),
    "no such form": item(b"Z", b"1"),
    "a form that is no letter": item(b"\xff", b"1"),
    "a key that is longer than the item": item(b"B", b"1", size=65_535),
    "an expiry that is no number": item(b"B", b"1", expiry=NAN),
    "an expiry without end": item(b"B", b"1", expiry=INFINITE),
    "a negative expiry": item(b"I", b"1", expiry=-5.0),
    "a version that is no number": item(b"B", b"1", version=NAN),
    "a time of storing without end": item(b"M", b"\x01", stored=INFINITE),
    "msgpack that ends early": item(b"M", b"\x92\x01"),
    "msgpack that is deep": item(b"M", DEEP),
    "msgpack that claims billions": item(b"M", CLAIMS),
    "nested claims": item(b"M", b"\xdc\xff\xff" * 20_000),
    "text that is no UTF-8": item(b"M", b"\xa2\xff\xfe"),
    "an extension": item(b"M", b"\xd4\x7f\x00"),
    "a key that cannot be one": item(b"M", b"\x81\x90\x01"),
    "a date that is none": item(b"M", b"\xd7\xff" + b"\xff" * 8),
    "an int without digits": item(b"I", b"x"),
    "an int of many digits": item(b"I", b"9" * 5000),
    "an int without a body": item(b"I", b""),
    "metadata that end early": item(b"o", b"\x00\x00"),
    "metadata that claim more": item(b"o", b"\xff\xff\xff\xff\x92"),
    "metadata that are deep": noted(DEEP),
    "metadata that claim billions": noted(CLAIMS),
    "metadata that are no list": noted(7),
    "metadata without a value": noted([None, []], b""),
    "a tag that is no text": noted([None, [[5, b"g"]]]),
    "a tag that is no UTF-8": noted(b"\x92\xc0\x91\x92\xa1\xff\xc4\x01g"),
    "a generation that is no bytes": noted([None, [["t", "g"]]]),
    "a generation that is long": noted([None, [["t", b"g" * 1000]]]),
    "tags that are no pairs": noted([None, [1, 2]]),
    "tags in a dict": noted([None, {"t": b"g"}]),
    "a load that is no list": noted([1, []]),
    "load times of another kind": noted([["a", [], {}, None], []]),
    "load times that are no numbers": noted([[NAN, INFINITE, None, NAN], []]),
    "a manifest that ends early": item(b"C", b"B"),
    "a manifest of no chunks": manifest(b"B", 0, 10),
    "a manifest of chunks that are not there": manifest(b"M", 3, 100),
    "a manifest that claims billions": manifest(b"M", 2**32 - 1, 2**63),
    "a lease that ends early": item(b"l", b"\x97\x01", expiry=1.0),
    "a lease of another kind": lease(1, 2, 3, 4, 5, 6, 7),
    "a lease whose token is no UTF-8": item(b"l", b"\x97\xa2\xff\xfe" + msgpack.packb(list(SOUND[1:]))[1:], expiry=1.0),
    "a lease whose token is no text": lease(b"t1", *SOUND[1:]),
    "a lease without an end": lease(SOUND[0], INFINITE, *SOUND[2:]),
    "a lease whose deadline is no number": lease(SOUND[0], NAN, *SOUND[2:]),
    "a lease whose tags are of another kind": lease(*SOUND[:4], [[1, 2]], *SOUND[5:]),
    "a lease whose stale value is damaged": lease(*SOUND[:5], b"damaged", SOUND[6]),
    "a lease whose stale value is poison": lease(*SOUND[:5], noted([[1, 9e9, None, None], [[1, 2]]]), SOUND[6]),
    "a lease that failed in no words": lease(*SOUND[:6], [1, 2]),
}

ASKED: dict[str, Callable[[str], Request[Any]]] = {
    "Get": Get,
    "GetMany": lambda key: GetMany((key, "k1")),
    "Exists": Exists,
    "Set": lambda key: Set(key, b"new"),
    "Set only_if": lambda key: Set(key, b"new", only_if="present"),
    "Set lease": lambda key: Set(key, b"new", 60.0, lease=SOUND[0]),
    "SetMany": lambda key: SetMany({key: b"new"}),
    "Add": lambda key: Add(key, b"new"),
    "CompareAndSet": lambda key: CompareAndSet(key, b"new", 5.0),
    "Touch": lambda key: Touch(key, 60.0),
    "Increment": Increment,
    "Delete": Delete,
    "DeleteMany": lambda key: DeleteMany((key,)),
    "GetOrLease": lambda key: GetOrLease(key, "p1", "t1", 5.0),
    "GetOrLease refresh": lambda key: GetOrLease(key, "p1", "t2", 5.0, refresh=True),
    "RenewLease": lambda key: RenewLease(key, SOUND[0], 5.0),
    "ReleaseLease": lambda key: ReleaseLease(key, SOUND[0], "ValueError"),
}


async def poisoned(server: Server, name: str, value: bytes) -> None:
    def write() -> None:
        client = pymemcache.Client((server.host, server.port), default_noreply=False)
        client.set(name, value)
        client.close()

    await sync(write)


@pytest.mark.parametrize("kind", POISON)
async def test_poison_costs_its_own_key(server: Server, store: MemcachedStore, kind: str) -> None:
    bystanders = [f"k{number}" for number in range(19)]
    assert not isinstance(await one(store, SetMany({key: key.encode() for key in bystanders})), Failed)
    (kept,) = store._servers.values()
    connection = kept.connection
    for asked, make in ASKED.items():
        await poisoned(server, name_of(store, "bad"), POISON[kind])
        batch: list[Request[Any]] = [Get(key) for key in bystanders]
        batch.insert(7, make("bad"))
        replies: list[Any] = list(await store.execute(batch))
        mine = replies.pop(7)
        assert mine is not None, asked
        assert isinstance(replies[0], Found), (asked, replies[0])
        assert [reply.value for reply in replies] == [key.encode() for key in bystanders], asked
        if isinstance(mine, Failed):
            assert "cannot process an answer" not in mine.detail, asked
        # A later write succeeds.
        assert isinstance(await one(store, Set("bad", b"good")), Stored)
        assert (await one(store, Get("bad"))).value == b"good"
    assert kept.connection is connection
    assert connection is not None
    assert connection.lost is None


@pytest.mark.parametrize("poison", [b"", b"junk", b"9" * 5000, b"\xff" * 300, b"g" * 65])
async def test_poison_in_the_place_of_a_generation_is_replaced_or_costs_its_tag(
    server: Server, store: MemcachedStore, poison: bytes
) -> None:
    assert isinstance(await one(store, Set("k", b"1")), Stored)
    (kept,) = store._servers.values()
    connection = kept.connection
    assert connection is not None
    await poisoned(server, connection.head + store._keys.tag("bad"), poison)
    tagged, plain = await store.execute([Set("t", b"1", tags=("bad",)), Get("k")])
    assert tagged is not None
    assert isinstance(plain, Found)
    await poisoned(server, store._keys.generation_name.decode(), poison)
    replies = await store.execute([Set("k", b"2"), Get("k")])
    assert isinstance(replies[1], Found)
    assert kept.connection is connection


@pytest.mark.parametrize(
    "poison", [b"", b"junk", b"1 2 3", b"1 2 3 0", b"-1 -1 -1 -1", b"9" * 5000, b" ".join([b"9" * 300] * 4), b"\xff"]
)
async def test_poison_under_a_limit_is_written_over(server: Server, store: MemcachedStore, poison: bytes) -> None:
    await one(store, Get("warm"))
    await poisoned(server, store._keys.limit("bad"), poison)
    replies = await store.execute([Admit("bad", 5, 1.0, 5), Admit("good", 5, 1.0, 5)])
    assert all(isinstance(reply, Admitted) for reply in replies)


@pytest.mark.parametrize("poison", [b"", b"junk", b"x|t|o", b"9" * 400 + b"|t|o", b"\xff\xfe|t|o", b"1|t"])
async def test_poison_in_the_place_of_a_lock_costs_that_lock(server: Server, poison: bytes) -> None:
    store = MemcachedLockStore([Endpoint(server.host, server.port)], namespace="poison", timeout=5.0)
    await store.open()
    try:
        (kept,) = store._servers.values()
        connection = kept.connection
        assert connection is not None
        item_of = _Locks(connection, "poison")._item
        await poisoned(server, item_of("bad"), poison)
        await poisoned(server, item_of("counted") + "+", poison)
        replies = await store.execute(
            [
                AcquireLock("bad", "t1", "me", 5.0),
                DescribeLock("bad"),
                AcquireLock("counted", "t2", "me", 5.0),
                AcquireLock(f"good{poison!r}", "t3", "me", 5.0),
            ]
        )
        assert isinstance(replies[0], Failed)
        assert isinstance(replies[1], Failed)
        assert isinstance(replies[2], Failed)
        assert isinstance(replies[3], LockGranted)
        assert kept.connection is connection
    finally:
        await store.close()
