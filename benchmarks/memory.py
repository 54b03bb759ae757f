"""The memory backend against its peers: reads, writes, decorated calls, and events without a listener."""

from __future__ import annotations

import asyncio
import datetime as dt
import itertools
import random
import warnings
from threading import RLock
from typing import Any

import aiocache
import cachetools
import pyresilience
import theine

from cachebus import open_cache, open_sync_cache

from .timing import Bar, Contender, Row, awaits, calls, measure, measure_async

ENTRIES = 10_000
TTL = 1000.0


def request_keys(count: int = 20_000) -> list[str]:
    """Return existing keys with a typical popularity (Zipf, exponent 0.99).

    Each is a new object, as in an application.
    """
    chance = random.Random(7)
    ranks = chance.sample(range(ENTRIES), ENTRIES)
    weights = list(itertools.accumulate(1 / rank**0.99 for rank in range(1, ENTRIES + 1)))
    return [f"user:{number}" for number in chance.choices(ranks, cum_weights=weights, k=count)]


def all_keys() -> list[str]:
    """Return all keys."""
    return [f"user:{number}" for number in range(ENTRIES)]


async def awaited_rows() -> list[Row]:
    """Return the rows for awaited reads, writes and decorated calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cashews import Cache as Cashews
    keys = request_keys()
    locked, plain = RLock(), cachetools.TTLCache[str, Any](2 * ENTRIES, TTL)
    cashews = Cashews()
    cashews.setup("mem://", size=2 * ENTRIES)
    aio = aiocache.Cache(aiocache.Cache.MEMORY)
    async with open_cache(f"memory://?max_entries={2 * ENTRIES}") as ours:
        for key in all_keys():
            await ours.set(key, key, ttl=TTL)
            plain[key] = key
            await cashews.set(key, key, expire=TTL)
            await aio.set(key, key, ttl=TTL)

        def locked_get(key: str) -> Any:
            with locked:
                return plain.get(key)

        async def plain_gets(operations: int) -> None:
            for key in keys[:operations]:
                locked_get(key)

        def locked_set(key: str) -> None:
            with locked:
                plain[key] = key

        async def plain_sets(operations: int) -> None:
            for key in keys[:operations]:
                locked_set(key)

        reads = Row(
            "awaited get, hit",
            Contender("cachebus", awaits(ours.get, keys)),
            [
                Contender("cashews mem://", awaits(cashews.get, keys)),
                Contender("cachetools TTLCache+RLock", plain_gets),
                Contender("aiocache", awaits(aio.get, keys)),
            ],
            [Bar("cashews mem://", 0.17), Bar("cachetools TTLCache+RLock", 0.45), Bar("aiocache", 0.05)],
            clock="processor",
        )
        writes = Row(
            "awaited set, overwriting",
            Contender("cachebus", awaits(lambda key: ours.set(key, key, ttl=TTL), keys)),
            [
                Contender("cashews mem://", awaits(lambda key: cashews.set(key, key, expire=TTL), keys)),
                Contender("cachetools TTLCache+RLock", plain_sets),
                Contender("aiocache", awaits(lambda key: aio.set(key, key, ttl=TTL), keys)),
            ],
            [Bar("cachetools TTLCache+RLock", 1.0)],
            clock="processor",
        )
        await measure_async(reads, operations=5_000)
        await measure_async(writes, operations=5_000)

        @ours.cached(key="call:{number}", ttl=TTL)
        async def decorated(number: str) -> str:
            return number

        @pyresilience.resilient(cache=pyresilience.CacheConfig(max_size=2 * ENTRIES, ttl=TTL))
        async def resilient(number: str) -> str:
            return number

        @cashews(ttl=TTL, key="call:{number}")
        async def cashewed(number: str) -> str:
            return number

        @aiocache.cached(ttl=TTL)
        async def aiocached(number: str) -> str:
            return number

        few = keys[:2000]
        calls_row = Row(
            "decorated coroutine function, hit",
            Contender("cachebus", awaits(decorated, few)),
            [
                Contender("pyresilience", awaits(resilient, few)),
                Contender("cashews", awaits(cashewed, few)),
                Contender("aiocache", awaits(aiocached, few)),
            ],
            [Bar("pyresilience", 0.7), Bar("cashews", 0.15), Bar("aiocache", 0.15)],
            clock="processor",
        )
        await measure_async(calls_row, operations=2_000)
    await cashews.close()
    return [reads, writes, calls_row]


def plain_rows() -> list[Row]:
    """Return the rows for reads, writes and decorated calls without an event loop."""
    keys = request_keys()
    ours = open_sync_cache(f"memory://?max_entries={2 * ENTRIES}")
    resilience = pyresilience.ResultCache(pyresilience.CacheConfig(max_size=2 * ENTRIES, ttl=TTL))
    tiny: Any = theine.Cache(2 * ENTRIES)
    lifetime = dt.timedelta(seconds=TTL)
    for key in all_keys():
        ours.set(key, key, ttl=TTL)
        resilience.put(key, key)
        tiny.set(key, key, lifetime)
    rows = [
        Row(
            "plain get, hit",
            Contender("cachebus", calls(ours.get, keys)),
            [Contender("pyresilience", calls(resilience.get, keys)), Contender("theine", calls(tiny.get, keys))],
            [Bar("pyresilience", 0.95), Bar("theine", 0.5)],
            clock="processor",
        ),
        Row(
            "plain set, overwriting",
            Contender("cachebus", calls(lambda key: ours.set(key, key, ttl=TTL), keys)),
            [
                Contender("pyresilience", calls(lambda key: resilience.put(key, key), keys)),
                Contender("theine", calls(lambda key: tiny.set(key, key, lifetime), keys)),
            ],
            clock="processor",
        ),
    ]

    @ours.cached(key="call:{number}", ttl=TTL)
    def decorated(number: str) -> str:
        return number

    @pyresilience.resilient(cache=pyresilience.CacheConfig(max_size=2 * ENTRIES, ttl=TTL))
    def resilient(number: str) -> str:
        return number

    @cachetools.cached(cachetools.TTLCache(2 * ENTRIES, TTL), lock=RLock())
    def tooled(number: str) -> str:
        return number

    rows.append(
        Row(
            "decorated plain function, hit",
            Contender("cachebus", calls(decorated, keys)),
            [
                Contender("pyresilience", calls(resilient, keys)),
                Contender("cachetools.cached(TTL)", calls(tooled, keys)),
            ],
            [Bar("pyresilience", 0.75), Bar("cachetools.cached(TTL)", 1.7)],
            clock="processor",
        )
    )
    for row in rows:
        measure(row, operations=10_000, rounds=11)
    ours.close()
    return rows


def event_row() -> Row:
    """Return the row for a `get` with a listener to other events, against one without a listener."""
    keys = request_keys()
    silent = open_sync_cache(f"memory://?max_entries={2 * ENTRIES}")
    heard = open_sync_cache(f"memory://?max_entries={2 * ENTRIES}")
    for key in all_keys():
        silent.set(key, key)
        heard.set(key, key)
    listener = heard.events("actor_restarted")
    row = measure(
        Row(
            "plain get with a listener to other events",
            Contender("cachebus, a listener elsewhere", calls(heard.get, keys)),
            [Contender("cachebus, no listener", calls(silent.get, keys))],
            [Bar("cachebus, no listener", 1.1)],
            clock="processor",
        ),
        operations=10_000,
    )
    listener.close()
    silent.close()
    heard.close()
    return row


def rows() -> list[Row]:
    """Return all rows of this module."""
    return [*plain_rows(), *asyncio.run(awaited_rows()), event_row()]
