"""Locks in a Redis Cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio
import pytest

import cachebus.settings  # noqa: F401 (which blocks, as an import does, if a test is the first to open a cache)
from cachebus import open_cache
from cachebus.adapters.redis.locks import CLAIM_MS
from cachebus.testing.servers import Server, run_redis_cluster

from ...lateness import within
from .fleet import check_journal, fleet

pytestmark = pytest.mark.anyio

CLAIM = CLAIM_MS / 1000


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sequence[Server]]:
    with run_redis_cluster() as servers:
        yield servers


async def test_in_a_cluster_a_lock_goes_from_process_to_process_by_a_push(
    cluster: Sequence[Server], tmp_path: Path
) -> None:
    url = f"redis+cluster://{','.join(f'127.0.0.1:{each.port}' for each in cluster)}"
    journal = tmp_path / "journal"
    journal.touch()
    async with fleet(2, url) as processes:
        began = time.monotonic()
        for each in processes:
            each.tell("contend", "a", 20, 5, journal)
        with anyio.fail_after(60):
            for each in processes:
                assert await each.hears() == "done"
        assert time.monotonic() - began < within(15)
        tokens = check_journal(journal.read_text())
        assert len(tokens) == 200
        assert tokens == sorted(set(tokens))


async def test_in_a_cluster_a_waiter_whose_process_is_gone_costs_the_claim(cluster: Sequence[Server]) -> None:
    url = f"redis+cluster://{','.join(f'127.0.0.1:{each.port}' for each in cluster)}"
    async with (
        fleet(1, url) as (gone,),
        open_cache(url, namespace="fleet") as cache,
        open_cache(url, namespace="fleet") as third,
    ):
        async with cache.lock("a", ttl=60):
            gone.tell("acquire", "a", 60, 60)
            await asyncio.sleep(0.5)
            waiting = asyncio.create_task(third.lock("a", wait=60).acquire())
            await asyncio.sleep(0.5)
            gone.kill()
        began = time.monotonic()
        async with asyncio.timeout(30):
            await waiting
        assert time.monotonic() - began < within(CLAIM)
