"""Fixtures: one real server for each test module, and stores connected to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pymemcache
import pytest
from anyio import to_thread
from pydantic import TypeAdapter

from cachebus.adapters.memcached.store import Endpoint, MemcachedStore
from cachebus.testing.servers import Server, run_memcached


@pytest.fixture(scope="session", autouse=True)
def pydantic_has_looked_for_plugins() -> None:
    """The first adapter of a process reads the metadata of every installed package, which blocks."""
    TypeAdapter(int)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with run_memcached() as running:
        yield running


@asynccontextmanager
async def opened(*servers: Any, namespace: str = "", **options: Any) -> AsyncGenerator[MemcachedStore]:
    """Open a store on these servers, with a new namespace unless one is given."""
    places = [Endpoint(each.host, each.port) for each in servers]
    # Only tests of failing servers set shorter timeouts.
    given = {"timeout": 5.0, "connect_timeout": 5.0, **options}
    store = MemcachedStore(places, namespace=namespace or f"t{uuid4().hex}", **given)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(server: Server) -> AsyncIterator[MemcachedStore]:
    async with opened(server) as made:
        yield made


async def one(store: Any, request: Any) -> Any:
    """Send one request alone, and return its reply."""
    (reply,) = await store.execute([request])
    return reply


async def sync(function: Any, *arguments: Any) -> Any:
    return await to_thread.run_sync(function, *arguments)


async def raw(server: Any, verb: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of a plain pymemcache client."""

    def ask() -> Any:
        client = pymemcache.Client((server.host, server.port), default_noreply=False)
        try:
            return getattr(client, verb)(*arguments, **options)
        finally:
            client.close()

    return await sync(ask)


def name_of(store: MemcachedStore, key: str, server: int = 0) -> str:
    """Return the name of a key on one of the servers."""
    connection = list(store._servers.values())[server].connection
    assert connection is not None
    assert connection.generation
    return store._keys.head(connection.generation) + store._keys.tail(key)[0]


def count_trips(store: MemcachedStore, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Record what the store sends from now on, one item for each round trip."""
    sent: list[bytes] = []
    for server in store._servers.values():
        connection: Any = server.connection
        write = connection._write

        def listened(data: bytes, write: Any = write) -> None:
            sent.append(data)
            write(data)

        monkeypatch.setattr(connection, "_write", listened)
    return sent
