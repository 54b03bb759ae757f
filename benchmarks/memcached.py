"""The Memcached backend against aiomcache, with many callers on one real server.

Also compares our multi-get with the driver's in a worker thread.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import aiomcache
import pymemcache
from anyio import to_thread

from cachebus import Cache, open_cache
from cachebus.bus import SYSTEM_CLOCK
from cachebus.messages import Get, Set
from cachebus.node.stores import build_store
from cachebus.settings import backend_from_url
from cachebus.testing.servers import Server, run_memcached

from .timing import Bar, Contender, Row, measure_async, shared

KEYS = [f"user:{number}" for number in range(2_000)]
ROUND = random.Random(7).choices(KEYS, k=5_000)
SIZE = 100
CALLERS = {1: 1_000, 10: 3_000, 100: 10_000}
"""Operations per round, by number of callers."""

PEER = "aiomcache"
BARS = {("get", 1): Bar(PEER, at_most=1.3), ("set", 1): Bar(PEER, at_most=1.4)}
BARS |= {("get", 100): Bar(PEER, at_least=3.5)}

BATCH = 100


async def rows_of(ours: Cache, theirs: Any, rounds: int) -> list[Row]:
    """Return the rows for reads and writes of values of one size."""
    value = bytes(SIZE)
    for key in KEYS:
        await ours.set(key, value)
        await theirs.set(key.encode(), value)
    operations: dict[str, tuple[Callable[[str], Awaitable[Any]], Callable[[str], Awaitable[Any]]]] = {
        "get": (ours.get, lambda key: theirs.get(key.encode())),
        "set": (
            lambda key: ours.set(key, value, ttl=1000.0),
            lambda key: theirs.set(key.encode(), value, exptime=1000),
        ),
    }
    done: list[Row] = []
    for name, (mine, peers) in operations.items():
        for callers, count in CALLERS.items():
            row = Row(
                f"Memcached {name}, {SIZE} bytes, {callers} caller{'s' * (callers > 1)}",
                Contender("cachebus", shared(callers, mine, ROUND)),
                [Contender(PEER, shared(callers, peers, ROUND))],
                [BARS[name, callers]] if (name, callers) in BARS else [],
            )
            await measure_async(row, operations=count, rounds=rounds)
            done.append(row)
    return done


async def tagged_row(ours: Cache, rounds: int) -> Row:
    """Return the row for reads of entries with a tag, against entries without."""
    for key in KEYS:
        await ours.set(key, bytes(SIZE))
        await ours.set(f"tagged:{key}", bytes(SIZE), tags=["users"])
    callers = 100
    row = Row(
        f"Memcached tagged get, {SIZE} bytes, {callers} callers",
        Contender("cachebus", shared(callers, lambda key: ours.get(f"tagged:{key}"), ROUND)),
        [Contender("cachebus, without a tag", shared(callers, ours.get, ROUND))],
    )
    return await measure_async(row, operations=CALLERS[callers], rounds=rounds)


async def batch_row(server: Server, rounds: int) -> Row:
    """Return the row for batches of reads by our store, against the driver in a worker thread."""
    store: Any = build_store(backend_from_url(server.url), namespace="batches", clock=SYSTEM_CLOCK)
    driver = pymemcache.Client((server.host, server.port), no_delay=True, timeout=5.0)
    await store.open()
    for key in KEYS:
        await to_thread.run_sync(driver.set, key, bytes(SIZE))
        await store.execute([Set(key, bytes(SIZE))])

    async def ours(operations: int) -> None:
        for at in range(0, operations, BATCH):
            await store.execute([Get(key) for key in ROUND[at : at + BATCH]])

    async def drivers(operations: int) -> None:
        for at in range(0, operations, BATCH):
            await to_thread.run_sync(driver.get_many, ROUND[at : at + BATCH])

    row = Row(
        f"Memcached, {BATCH} reads of a batch",
        Contender("cachebus", ours),
        [Contender("pymemcache get_many in a thread", drivers)],
    )
    await measure_async(row, operations=5_000, rounds=rounds)
    await store.close()
    driver.close()
    return row


async def compare(server: Server, rounds: int) -> list[Row]:
    """Return all rows, with one server."""
    theirs = aiomcache.Client(server.host, server.port)
    try:
        async with open_cache(server.url, timeout=30.0) as ours:
            done = [*await rows_of(ours, theirs, rounds), await tagged_row(ours, rounds)]
        return [*done, await batch_row(server, rounds)]
    finally:
        await theirs.close()


def rows(rounds: int = 7) -> list[Row]:
    """Return all rows of this module, with a new server."""
    with run_memcached() as server:
        return asyncio.run(compare(server, rounds))
