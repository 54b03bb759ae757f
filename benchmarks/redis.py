"""The Redis backend beside redis-py with hiredis: many callers on one real server, as shares of their time."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

import redis.asyncio as redis_py

from cachebus import Cache, open_cache
from cachebus.testing.servers import run_redis

from .timing import Bar, Contender, Row, measure_async

KEYS = [f"user:{number}" for number in range(2_000)]
ROUND = random.Random(7).choices(KEYS, k=5_000)
SMALL, LARGE = 100, 10_000
CALLERS = {1: 500, 10: 1_500, 100: 4_000, 1000: 8_000}
"""How many callers there are, and how many operations they share in a round: of redis-py's, most take 100 us, so that a
round of both is about a second at most."""

REACH = {
    ("get", SMALL): {1: 0.85, 10: 4, 100: 8, 1000: 15},
    ("set", SMALL): {1: 0.85, 10: 4, 100: 8, 1000: 10},
    ("get", LARGE): {1: 0.85, 10: 2, 100: 4, 1000: 6},
}
"""Our rate over redis-py's, at least."""

PEER = "redis-py + hiredis"


def by(callers: int, operation: Callable[[str], Awaitable[Any]]) -> Callable[[int], Awaitable[None]]:
    """Work that `callers` tasks share, each waiting for one answer before it asks again."""

    async def work(operations: int) -> None:
        async def caller(number: int) -> None:
            first = number * 37 % len(KEYS)
            for key in ROUND[first : first + operations // callers]:
                await operation(key)

        await asyncio.gather(*(caller(number) for number in range(callers)))

    return work


async def rows_of(ours: Cache, theirs: Any, size: int, rounds: int) -> list[Row]:
    """Reads and writes of values of one size."""
    value = bytes(size)
    for key in KEYS:
        await ours.set(key, value)
        await theirs.set(key, value)
    operations: dict[str, tuple[Callable[[str], Awaitable[Any]], Callable[[str], Awaitable[Any]]]] = {
        "get": (ours.get, theirs.get),
        "set": (lambda key: ours.set(key, value, ttl=1000.0), lambda key: theirs.set(key, value, px=1_000_000)),
    }
    done: list[Row] = []
    for name, (mine, peers) in operations.items():
        reach = REACH.get((name, size), {})
        for callers, count in CALLERS.items():
            row = Row(
                f"redis {name}, {size:,} bytes, {callers} callers",
                Contender("cachebus", by(callers, mine)),
                [Contender(PEER, by(callers, peers))],
                [Bar(PEER, 1 / reach[callers])] if callers in reach else [],
            )
            await measure_async(row, operations=count if size == SMALL else count // 2, rounds=rounds)
            done.append(row)
    return done


async def slowest_of(ours: Cache, theirs: Any, rounds: int) -> Row:
    """The latency that one read in a hundred exceeds, as each of 100 callers sees it."""
    callers, count = 100, CALLERS[100]

    async def percentile(get: Callable[[str], Awaitable[Any]]) -> float:
        seen: list[float] = []

        async def timed(key: str) -> None:
            started = perf_counter()
            await get(key)
            seen.append(perf_counter() - started)

        gc.collect()
        gc.disable()
        await by(callers, timed)(count)
        gc.enable()
        return statistics.quantiles(seen, n=100)[98]

    contenders = [Contender("cachebus", ours.get), Contender(PEER, theirs.get)]
    for each in contenders:
        await percentile(each.work)  # warm
    for number in range(rounds):
        for each in contenders[:: -1 if number % 2 else 1]:
            each.rounds.append(await percentile(each.work))
    return Row(f"redis get, {SMALL} bytes, p99 at {callers} callers", contenders[0], contenders[1:], [Bar(PEER, 1.0)])


async def compare(url: str, rounds: int) -> list[Row]:
    """Every row, against the server at `url`."""
    # A pool of redis-py's raises beyond its bound: it gets one connection a caller.
    theirs = redis_py.Redis.from_url(url, max_connections=max(CALLERS))
    try:
        async with open_cache(url, timeout=30.0) as ours:
            rows = await rows_of(ours, theirs, SMALL, rounds)
            rows.append(await slowest_of(ours, theirs, rounds))
            return [*rows, *await rows_of(ours, theirs, LARGE, rounds)]
    finally:
        await theirs.aclose()


def rows(rounds: int = 5) -> list[Row]:
    """Every row of this module, against a server of its own."""
    with run_redis() as server:
        return asyncio.run(compare(server.url, rounds))
