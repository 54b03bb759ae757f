"""The guarantees of the simulation on a real Redis in real time: no invalidated value is read again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from cachebus import Cache, CacheError, open_cache
from cachebus.settings import Settings, load_settings
from cachebus.testing.servers import run_redis

KEYS = 3
SECONDS = 4.0


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def settings() -> Iterator[Settings]:
    with run_redis() as server:
        yield load_settings(server.url, namespace="shop")


READS, WRITES = 300, 20
"""Minimum number of operations of each kind; for writes, per key."""


class Broken(Exception):
    """Error of a loader."""


class Shop:
    """Versioned source of truth, read through several caches and changed by several writers."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.truth = [1] * KEYS
        self.floor = [1] * KEYS
        self.writing = [asyncio.Lock() for _ in range(KEYS)]
        self.reads = 0
        self.stale_reads: list[str] = []

    def open(self, until: float) -> bool:
        """Return `True` until enough operations are done, however slow the machine is."""
        now = asyncio.get_running_loop().time()
        return now < until or (now < until + 60 and (self.reads <= READS or max(self.truth) <= WRITES))

    async def read(self, cache: Cache, until: float) -> None:
        while self.open(until):
            key = self.chance.randrange(KEYS)
            options: dict[str, Any] = {
                "ttl": self.chance.choice((0.01, 0.05, 5.0)),
                "stale_for": self.chance.choice((0.0, 5.0)),
                "lease_ttl": self.chance.choice((0.02, 5.0)),
                "refresh": self.chance.choice((None, 0.3)),
                "soft_timeout": self.chance.choice((None, 0.0, 0.01)),
                "wait_limit": self.chance.choice((0.05, 5.0)),
            }
            floor = self.floor[key]
            try:
                value = await cache.get_or_load(f"key{key}", lambda key=key: self.load(key), **options)
            except (Broken, CacheError):
                continue
            self.reads += 1
            if value < floor:
                self.stale_reads.append(f"key{key} was read as {value}, but {floor} had been made known")
            await asyncio.sleep(self.chance.choice((0.0, 0.002)))

    async def load(self, key: int) -> int:
        await asyncio.sleep(self.chance.choice((0.0, 0.005)))
        value = self.truth[key]
        await asyncio.sleep(self.chance.choice((0.0, 0.005, 0.03)))
        if self.chance.random() < 0.1:
            raise Broken
        return value

    async def write(self, cache: Cache, until: float) -> None:
        while self.open(until):
            await asyncio.sleep(self.chance.choice((0.0, 0.01, 0.05)))
            key = self.chance.randrange(KEYS)
            how = self.chance.choice(("delete", "delete_many", "pattern", "set", "clear"))
            keys = list(range(KEYS)) if how == "clear" else [key]
            async with AsyncExitStack() as locks:
                for each in keys:
                    await locks.enter_async_context(self.writing[each])
                for each in keys:
                    self.truth[each] += 1
                versions = {each: self.truth[each] for each in keys}
                match how:
                    case "delete":
                        await cache.delete(f"key{key}")
                    case "delete_many":
                        await cache.delete_many([f"key{key}"])
                    case "pattern":
                        await cache.delete_pattern(f"key{key}*")
                    case "set":
                        await cache.set(f"key{key}", versions[key], ttl=0.02)
                    case _:
                        await cache.clear()
                for each, version in versions.items():
                    self.floor[each] = max(self.floor[each], version)


async def test_no_read_returns_what_was_invalidated_before_it_began(settings: Settings) -> None:
    shop = Shop(seed=1)
    async with AsyncExitStack() as stack:
        caches = [await stack.enter_async_context(open_cache(settings)) for _ in range(3)]
        until = asyncio.get_running_loop().time() + SECONDS
        readers = [shop.read(cache, until) for cache in caches for _ in range(6)]
        await asyncio.gather(*readers, *(shop.write(cache, until) for cache in caches))
    assert shop.stale_reads == []
    assert shop.reads > READS
    assert max(shop.truth) > WRITES
