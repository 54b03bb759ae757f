"""Fixtures: one real server for each test module, and stores connected to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from cachebus.actors.ports import PipelinedStore
from cachebus.bus import SYSTEM_CLOCK
from cachebus.messages import Clear
from cachebus.node.stores import build_store
from cachebus.settings import backend_from_url
from cachebus.testing.servers import Server, run_redis


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with run_redis() as running:
        yield running


@asynccontextmanager
async def opened(url: str, *, namespace: str = "tests") -> AsyncGenerator[Any]:
    """Open a store at a URL."""
    store: Any = build_store(backend_from_url(url), namespace=namespace, clock=SYSTEM_CLOCK)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(server: Server) -> AsyncIterator[PipelinedStore]:
    async with opened(server.url) as made:
        await one(made, Clear())
        yield made


async def one(store: Any, request: Any) -> Any:
    """Send one request alone, and return its reply."""
    (reply,) = await store.execute([request])
    return reply


async def submitted(store: Any, *requests: Any) -> list[Any]:
    """Submit requests one by one without waiting, and return their replies."""
    futures: list[asyncio.Future[Any]] = []
    for request in requests:
        future = asyncio.get_running_loop().create_future()
        await store.submit([request], lambda replies, future=future: future.set_result(replies[0]))
        futures.append(future)
    return list(await asyncio.gather(*futures))
