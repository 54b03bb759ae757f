"""Rate limits against the fixed windows of cashews: sequential checks on memory and on Redis."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from cashews import Cache as CashewsCache

from cachebus import open_cache
from cachebus.testing.servers import run_redis

from .timing import Contender, Row, measure_async

LIMIT, PER = 10**9, 3600
"""A limit that is never reached, because a refusal takes a shorter path."""


def _times(call: Callable[[], Awaitable[Any]]) -> Callable[[int], Awaitable[None]]:
    async def work(operations: int) -> None:
        for _ in range(operations):
            await call()

    return work


async def _row(title: str, ours: str, theirs: str, operations: int) -> Row:
    peer = CashewsCache()
    peer.setup(theirs)

    @peer.rate_limit(limit=LIMIT, period=PER, key="limit")
    async def nothing() -> None: ...

    async with open_cache(ours) as cache:
        limit = cache.rate_limit("limit", LIMIT, PER)
        row = Row(
            title,
            Contender("cachebus", _times(limit.check)),
            [Contender("cashews rate_limit", _times(nothing))],
        )
        await measure_async(row, operations)
    await peer.close()
    return row


def rows() -> list[Row]:
    """Return the rows of this module, which have no bars."""
    made = [asyncio.run(_row("rate limit, awaited check, memory", "memory://", "mem://", 5_000))]
    with run_redis() as server:
        made.append(asyncio.run(_row("rate limit, one caller, Redis", server.url, server.url, 500)))
    return made
