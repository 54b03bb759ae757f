"""The Redis backend against redis-py with hiredis and the floor under both, with many callers on one real server."""

from __future__ import annotations

import asyncio
import gc
import random
import statistics
from collections.abc import Awaitable, Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

import redis.asyncio as redis_py

from cachebus import Cache, open_cache
from cachebus.testing.servers import Server, run_redis

from .redis_floor import Floor
from .timing import Bar, Contender, Row, announce, measure_async, shared

Operation = Callable[[str], Awaitable[Any]]

KEYS = [f"user:{number}" for number in range(2_000)]
ROUND = random.Random(7).choices(KEYS, k=5_000)
SMALL, LARGE = 100, 10_000
CALLERS = {1: 500, 10: 1_500, 100: 4_000, 1000: 8_000}
"""Operations per round, by number of callers. redis-py takes about 100 us each, so a round takes a second at most."""

REACH = {
    ("get", SMALL): {1: 1.0, 10: 4, 100: 10, 1000: 12},
    ("set", SMALL): {1: 0.95, 10: 3.5, 100: 8, 1000: 9},
    ("get", LARGE): {1: 0.85, 10: 2, 100: 4, 1000: 6},
    ("set", LARGE): {100: 2},
}
"""Minimum of our rate over redis-py's."""

REACH_FLOOR = {100: 1.8}
"""Maximum of our processor time over the floor's."""

FLOOR = "asyncio + hiredis floor"
PEER = "redis-py + hiredis"


async def rows_of(ours: Cache, theirs: Any, size: int, rounds: int, floor: Floor | None = None) -> list[Row]:
    """Return the rows for reads and writes of values of one size. Reads are also compared with `floor`, if given."""
    value = bytes(size)
    for key in KEYS:
        await ours.set(key, value)
        await theirs.set(key, value)
    operations: dict[str, tuple[Operation, Operation]] = {
        "get": (ours.get, theirs.get),
        "set": (lambda key: ours.set(key, value, ttl=1000.0), lambda key: theirs.set(key, value, px=1_000_000)),
    }
    done: list[Row] = []
    for name, (mine, peers) in operations.items():
        reach = REACH.get((name, size), {})
        for callers, count in CALLERS.items():
            row = Row(
                f"Redis {name}, {size:,} bytes, {callers} caller{'s' * (callers > 1)}",
                Contender("cachebus", shared(callers, mine, ROUND)),
                [Contender(PEER, shared(callers, peers, ROUND))],
                [Bar(PEER, at_least=reach[callers])] if callers in reach else [],
            )
            done.append(row)
            bare = Contender(FLOOR, shared(callers, floor.get, ROUND)) if floor and name == "get" else None
            both = row if bare is None else replace(row, peers=[*row.peers, bare])
            await measure_async(both, operations=count if size == SMALL else count // 2, rounds=rounds)
            if bare is not None:
                bars = [Bar(FLOOR, at_most=REACH_FLOOR[callers])] if callers in REACH_FLOOR else []
                done.append(Row(f"{row.title}, processor time", row.ours, [bare], bars, clock="processor"))
    return done


async def slowest_of(ours: Cache, theirs: Any, rounds: int) -> Row:
    """Return the row for the 99th percentile of the latency of reads, as seen by each of 100 callers."""
    callers, count = 100, CALLERS[100]

    async def percentile(get: Callable[[str], Awaitable[Any]]) -> float:
        seen: list[float] = []

        async def timed(key: str) -> None:
            started = perf_counter()
            await get(key)
            seen.append(perf_counter() - started)

        gc.collect()
        gc.disable()
        await shared(callers, timed, ROUND)(count)
        gc.enable()
        return statistics.quantiles(seen, n=100)[98]

    announce(title := f"Redis get, {SMALL} bytes, p99 at {callers} callers")
    contenders = [Contender("cachebus", ours.get), Contender(PEER, theirs.get)]
    for each in contenders:
        await percentile(each.work)  # warm
    for number in range(rounds):
        for each in contenders[:: -1 if number % 2 else 1]:
            each.times["wall"].append(await percentile(each.work))
    return Row(title, contenders[0], contenders[1:], [Bar(PEER, at_most=1.0)])


async def compare(server: Server, rounds: int) -> list[Row]:
    """Return all rows, with one server."""
    # redis-py's pool raises when it is exhausted, so it gets one connection per caller.
    theirs = redis_py.Redis.from_url(server.url, max_connections=max(CALLERS))
    floor = await Floor.connected(server.host, server.port)
    try:
        async with open_cache(server.url, timeout=30.0) as ours:
            rows = await rows_of(ours, theirs, SMALL, rounds, floor)
            rows.append(await slowest_of(ours, theirs, rounds))
            return [*rows, *await rows_of(ours, theirs, LARGE, rounds)]
    finally:
        floor.close()
        await theirs.aclose()


def rows(rounds: int = 7) -> list[Row]:
    """Return all rows of this module, with a new server."""
    with run_redis() as server:
        return asyncio.run(compare(server, rounds))
