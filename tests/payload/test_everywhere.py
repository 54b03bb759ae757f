"""Payloads over Memcached and over the backend of a worker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from cachebus import Cache, open_cache
from cachebus.node.node import Node
from cachebus.settings import load_settings
from cachebus.testing.servers import Server, memcached_server, nats_server

from .pipelines import same

__all__ = ["memcached_server", "nats_server"]

KEY = "0123456789abcdef0123456789abcdef"
PAYLOADS: dict[str, dict[str, Any]] = {
    "default": {},
    "json": {"serializer": "json", "checksum": True},
    "compressed": {"compression": "zlib", "threshold": 64},
    "signed": {"serializer": "pickle", "signing_keys": [KEY]},
    "sealed": {"encryption_keys": {"k1": KEY}},
}
VALUE = {
    "at": datetime(2026, 1, 2, tzinfo=UTC),
    "price": Decimal("1.50"),
    "of": (1, {2, 3}, b"\x00"),
    "long": "x" * 500,
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """nats-py only supports asyncio."""
    return "asyncio"


@asynccontextmanager
async def _over_memcached(server: Server, payload: dict[str, Any]) -> AsyncIterator[Cache]:
    async with open_cache(server.url, namespace=uuid4().hex, payload=payload, on_error="raise") as cache:
        yield cache


@asynccontextmanager
async def _over_the_bus(server: Server, payload: dict[str, Any]) -> AsyncIterator[Cache]:
    namespace = uuid4().hex
    worker = load_settings(namespace=namespace, bus=server.url)
    async with (
        Node(worker, serve=True),
        open_cache("bus:primary", bus=server.url, namespace=namespace, payload=payload, on_error="raise") as cache,
    ):
        yield cache


@pytest.fixture(params=["memcached", "bus"])
def place(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "memcached":
        server = request.getfixturevalue("memcached_server")
        yield lambda payload: _over_memcached(server, payload)
    else:
        server = request.getfixturevalue("nats_server")
        yield lambda payload: _over_the_bus(server, payload)


@pytest.mark.parametrize("name", PAYLOADS)
async def test_a_value_comes_back_as_it_went(place: Any, name: str) -> None:
    async with place(PAYLOADS[name]) as cache:
        assert await cache.set("k", VALUE, ttl=60)
        assert same(await cache.get("k"), VALUE)
        await cache.set_many({"a": (1,), "b": {2}})
        assert same(await cache.get_many(["a", "b"]), {"a": (1,), "b": {2}})
        found = await cache.lookup("k")
        assert await cache.compare_and_set("k", (2,), version=found.version)
        assert same(await cache.get("k"), (2,))
        assert not await cache.add("k", 3)


async def test_counters_count_what_was_set(place: Any) -> None:
    async with place({}) as cache:
        await cache.set("n", 41)
        assert await cache.increment("n") == 42
        assert await cache.get("n") == 42
