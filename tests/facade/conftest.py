from __future__ import annotations

from collections.abc import Iterator

import pytest

from cachebus import SyncCache

from ..clock import ManualClock
from .faces import a_sync_cache


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def sync_cache(clock: ManualClock) -> Iterator[SyncCache]:
    with a_sync_cache(clock=clock) as cache:
        yield cache
