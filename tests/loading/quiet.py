"""What is left of loads once nobody waits for them: nothing."""

from __future__ import annotations

import anyio

from cachebus import Cache


async def quiet(cache: Cache) -> None:
    await anyio.wait_all_tasks_blocked()
    assert cache.loads.table.in_flight == {}
    assert len(cache.loads.table.renewals) == 0
