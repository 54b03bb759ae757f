"""What is left of loads once nobody waits for them: nothing."""

from __future__ import annotations

import anyio

from cachebus import Cache


async def quiet(cache: Cache) -> None:
    await anyio.wait_all_tasks_blocked()
    assert cache._loads.flights == {}
    assert len(cache._loads.renewals) == 0
