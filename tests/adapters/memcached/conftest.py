"""A real server for the tests of a module, and stores in it."""

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
    """A store on these servers, open, in a namespace of its own unless one is named."""
    places = [Endpoint(each.host, each.port) for each in servers]
    # Only tests of servers that fail say how long one is given.
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
    """The reply to one request, sent alone."""
    (reply,) = await store.execute([request])
    return reply


async def sync(function: Any, *arguments: Any) -> Any:
    return await to_thread.run_sync(function, *arguments)


async def raw(server: Any, verb: str, *arguments: Any, **options: Any) -> Any:
    """What the driver alone gets from a server."""

    def ask() -> Any:
        client = pymemcache.Client((server.host, server.port), default_noreply=False)
        try:
            return getattr(client, verb)(*arguments, **options)
        finally:
            client.close()

    return await sync(ask)


def name_of(store: MemcachedStore, key: str, server: int = 0) -> str:
    """What a key of the store is called at one of its servers."""
    connection = list(store._servers.values())[server].connection
    assert connection is not None
    assert connection.generation
    return store._keys.head(connection.generation) + store._keys.tail(key)[0]


def count_trips(store: MemcachedStore, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the store sends from here on, a piece for each round trip."""
    sent: list[bytes] = []
    for server in store._servers.values():
        connection: Any = server.connection
        write = connection._write

        def listened(data: bytes, write: Any = write) -> None:
            sent.append(data)
            write(data)

        monkeypatch.setattr(connection, "_write", listened)
    return sent
