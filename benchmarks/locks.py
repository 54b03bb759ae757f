"""Locks on Redis against redis-py's `Lock`: acquire and release, and handover among 50 callers."""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio as redis_py

from cachebus import Cache, open_cache
from cachebus.testing.servers import run_redis

from .timing import Bar, Contender, Row, measure_async

PEER = "redis-py Lock"
CONTENDERS = 50
UNCONTENDED, HANDED_OVER = 500, 100
"""Acquisitions per round, without contention and among 50 callers."""


async def uncontended(ours: Cache, theirs: Any, rounds: int) -> Row:
    """Time one caller that takes one lock after another."""

    async def mine(operations: int) -> None:
        for number in range(operations):
            async with ours.lock(f"ours {number % 100}"):
                pass

    async def peers(operations: int) -> None:
        for number in range(operations):
            async with theirs.lock(f"theirs {number % 100}", timeout=30):
                pass

    row = Row(
        "lock: acquire and release", Contender("cachebus", mine), [Contender(PEER, peers)], [Bar(PEER, at_most=1.2)]
    )
    return await measure_async(row, operations=UNCONTENDED, rounds=rounds)


async def handed_over(ours: Cache, theirs: Any, rounds: int) -> Row:
    """Time 50 callers that compete for one lock."""

    def by_all(lock: Any) -> Any:
        async def work(operations: int) -> None:
            async def caller() -> None:
                for _ in range(operations // CONTENDERS):
                    async with lock():
                        await asyncio.sleep(0)

            await asyncio.gather(*(caller() for _ in range(CONTENDERS)))

        return work

    row = Row(
        f"lock: handed over, {CONTENDERS} contenders",
        Contender("cachebus", by_all(lambda: ours.lock("ours", wait=60))),
        [Contender(PEER, by_all(lambda: theirs.lock("theirs", timeout=30)))],
        [Bar(PEER, at_least=3)],
    )
    return await measure_async(row, operations=HANDED_OVER, rounds=rounds)


async def compare(url: str, rounds: int) -> list[Row]:
    """Return both rows, with the server at `url`."""
    theirs = redis_py.Redis.from_url(url)
    try:
        async with open_cache(url) as ours:
            return [await uncontended(ours, theirs, rounds), await handed_over(ours, theirs, 2)]
    finally:
        await theirs.aclose()


def rows(rounds: int = 9) -> list[Row]:
    """Return all rows of this module, with a new server."""
    with run_redis() as server:
        return asyncio.run(compare(server.url, rounds))
