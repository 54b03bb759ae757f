"""Checks that loads leave no state behind once all callers have gone."""

from __future__ import annotations

import anyio

from cachebus import Cache


async def quiet(cache: Cache) -> None:
    await anyio.wait_all_tasks_blocked()
    assert cache.loads.table.in_flight == {}
    assert len(cache.loads.table.renewals) == 0
