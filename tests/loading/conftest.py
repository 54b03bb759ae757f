from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from cachebus import Cache
from cachebus.testing.servers import memcached_server

from ..clock import ManualClock
from ..facade.faces import a_cache

__all__ = ["memcached_server"]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def cache(clock: ManualClock) -> AsyncIterator[Cache]:
    async with a_cache(clock=clock) as cache:
        yield cache
