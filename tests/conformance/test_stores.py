"""The suite that every store must pass, run by every store that comes with cachebus."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from cachebus.adapters.chaos import ChaosStore
from cachebus.adapters.memcached.store import Endpoint as MemcachedPlace
from cachebus.adapters.memcached.store import MemcachedStore
from cachebus.adapters.memory.store import MemoryStore
from cachebus.adapters.redis.cluster.store import RedisClusterStore
from cachebus.adapters.redis.connect import Connector, Credentials, Endpoint
from cachebus.adapters.redis.store import RedisStore
from cachebus.bus.codec.messages import JSON
from cachebus.testing.fakes import CodecStore
from cachebus.testing.servers import Server, run_memcached, run_redis_cluster
from cachebus.testing.stores import AnyStore, StoreConformance

from ..clock import ManualClock

PATIENCE = 20.0
"""Seconds that a server on a busy machine is given: the suite is not about servers that fail."""


class OfMemory(StoreConformance):
    """What the stores over memory have in common: their time is the test's."""

    default_ttl = 120.0

    @staticmethod
    def wrap(memory: MemoryStore) -> AnyStore:
        raise NotImplementedError

    @pytest.fixture
    async def store(self) -> AsyncIterator[AnyStore]:
        self.clock: Any = ManualClock()
        store: AnyStore = self.wrap(MemoryStore(default_ttl=self.default_ttl, clock=self.clock))
        await store.open()
        yield store
        await store.close()

    @pytest.fixture
    async def neighbour(self, store: AnyStore) -> AsyncIterator[AnyStore]:
        neighbour: AnyStore = self.wrap(MemoryStore(default_ttl=self.default_ttl, clock=self.clock))
        await neighbour.open()
        yield neighbour
        await neighbour.close()

    async def elapse(self, seconds: float) -> None:
        self.clock.advance(seconds)

    def now(self) -> float:
        now: float = self.clock.monotonic()
        return now


class TestMemory(OfMemory):
    @staticmethod
    def wrap(memory: MemoryStore) -> AnyStore:
        return memory


class TestMemoryWithoutChaos(OfMemory):
    @staticmethod
    def wrap(memory: MemoryStore) -> AnyStore:
        return ChaosStore(memory, seed=1)


class TestMemoryBehindTheCodec(OfMemory):
    @staticmethod
    def wrap(memory: MemoryStore) -> AnyStore:
        return CodecStore(memory)


class TestMemoryBehindTheCodecAsJson(OfMemory):
    @staticmethod
    def wrap(memory: MemoryStore) -> AnyStore:
        return CodecStore(memory, content_type=JSON)


class TestRedis(StoreConformance):
    """On a real server."""

    default_ttl = 120.0
    big_value = 64 * 2**20

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    async def store(self, redis_server: Server) -> AsyncIterator[AnyStore]:
        async with opened(redis_server, f"t{uuid4().hex}", self.default_ttl) as store:
            yield store

    @pytest.fixture
    async def neighbour(self, redis_server: Server) -> AsyncIterator[AnyStore]:
        async with opened(redis_server, "t", self.default_ttl) as store:
            yield store


class TestRedisBehindTheCodec(TestRedis):
    """What a worker with a Redis store would answer."""

    @pytest.fixture
    async def store(self, redis_server: Server) -> AsyncIterator[AnyStore]:
        async with opened(redis_server, f"t{uuid4().hex}", self.default_ttl) as store:
            yield CodecStore(store)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sequence[Server]]:
    with run_redis_cluster() as servers:
        yield servers


class TestRedisCluster(StoreConformance):
    """On three real servers."""

    default_ttl = 120.0
    big_value = 64 * 2**20

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    async def store(self, cluster: Sequence[Server]) -> AsyncIterator[AnyStore]:
        async with opened_cluster(cluster, f"t{uuid4().hex}", self.default_ttl) as store:
            yield store

    @pytest.fixture
    async def neighbour(self, cluster: Sequence[Server]) -> AsyncIterator[AnyStore]:
        async with opened_cluster(cluster, "t", self.default_ttl) as store:
            yield store


class TestMemcached(StoreConformance):
    """On a real server."""

    default_ttl = 120.0

    @pytest.fixture
    async def store(self, memcached_server: Server) -> AsyncIterator[AnyStore]:
        async with opened_memcached([memcached_server], f"t{uuid4().hex}", self.default_ttl) as store:
            yield store

    @pytest.fixture
    async def neighbour(self, memcached_server: Server) -> AsyncIterator[AnyStore]:
        async with opened_memcached([memcached_server], "t", self.default_ttl) as store:
            yield store


@pytest.fixture(scope="module")
def two_memcacheds() -> Iterator[Sequence[Server]]:
    with run_memcached("-m", "512") as one, run_memcached("-m", "512") as other:
        yield [one, other]


class TestTwoMemcacheds(StoreConformance):
    """On two real servers that share the keys, with values over their limit for items in chunks."""

    default_ttl = 120.0

    @pytest.fixture
    async def store(self, two_memcacheds: Sequence[Server]) -> AsyncIterator[AnyStore]:
        async with opened_memcached(two_memcacheds, f"t{uuid4().hex}", self.default_ttl, chunked=True) as store:
            yield store

    @pytest.fixture
    async def neighbour(self, two_memcacheds: Sequence[Server]) -> AsyncIterator[AnyStore]:
        async with opened_memcached(two_memcacheds, "t", self.default_ttl, chunked=True) as store:
            yield store


@asynccontextmanager
async def opened_cluster(
    servers: Sequence[Server], namespace: str, default_ttl: float | None
) -> AsyncGenerator[AnyStore]:
    places = [Endpoint(host=server.host, port=server.port) for server in servers]
    store = RedisClusterStore(places, Connector(timeout=PATIENCE), namespace=namespace, default_ttl=default_ttl)
    await store.open()
    yield store
    await store.close()


@asynccontextmanager
async def opened_memcached(
    servers: Sequence[Server], namespace: str, default_ttl: float | None, **options: Any
) -> AsyncGenerator[AnyStore]:
    places = [MemcachedPlace(host=server.host, port=server.port) for server in servers]
    store = MemcachedStore(
        places, namespace=namespace, default_ttl=default_ttl, connect_timeout=PATIENCE, timeout=PATIENCE, **options
    )
    await store.open()
    yield store
    await store.close()


@asynccontextmanager
async def opened(server: Server, namespace: str, default_ttl: float | None) -> AsyncGenerator[AnyStore]:
    parts = urlsplit(server.url)
    identity = Credentials(user=parts.username or "", password=parts.password)
    store = RedisStore(
        [Endpoint(host=server.host, port=server.port)],
        Connector(identity=identity, timeout=PATIENCE),
        namespace=namespace,
        default_ttl=default_ttl,
    )
    await store.open()
    yield store
    await store.close()
