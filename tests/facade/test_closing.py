"""Closing: a call in flight is still answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest

from cachebus import open_cache
from cachebus.testing.servers import Server, run_memcached, run_redis

KEYS = [b"k" * 32]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("run", [run_redis, run_memcached])
async def test_a_read_under_way_returns_a_value_and_no_payload(
    run: Callable[[], AbstractContextManager[Server]],
) -> None:
    with run() as server:
        for payload in ({}, {"signing_keys": KEYS}):
            async with open_cache(server.url, payload=payload) as cache:
                await cache.set("key", {"a": 1})
                reading = asyncio.create_task(cache.get("key"))
                await asyncio.sleep(0)  # The request is sent, and the caller waits for the reply.
                await cache.close()
                assert await reading == {"a": 1}


async def test_a_payload_that_nobody_signed_is_a_miss_though_the_cache_closes() -> None:
    with run_redis() as server:
        async with open_cache(server.url) as plain:
            await plain.set("key", "unsigned")
        async with open_cache(server.url, payload={"signing_keys": KEYS}) as cache:
            reading = asyncio.create_task(cache.get("key", "default"))
            await asyncio.sleep(0)
            await cache.close()
            assert await reading == "default"
