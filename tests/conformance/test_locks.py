"""The suite that every lock store must pass, run by every one that comes with cachebus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from uuid import uuid4

import pytest

from cachebus.actors import LockStore
from cachebus.adapters.memory.locks import LockTable
from cachebus.bus import SYSTEM_CLOCK
from cachebus.node.stores import build_lock_store
from cachebus.settings import backend_from_url
from cachebus.testing.locks import LockStoreConformance
from cachebus.testing.servers import Server, run_memcached, run_redis_cluster


class TestMemory(LockStoreConformance):
    @pytest.fixture
    def store(self) -> LockStore:
        return LockTable()

    @pytest.fixture
    def neighbour(self) -> LockStore:
        return LockTable()


class OfServers(LockStoreConformance):
    """What the stores of servers have in common."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def namespace(self) -> str:
        return uuid4().hex

    @pytest.fixture
    def store(self, url: str, namespace: str) -> LockStore:
        return build_lock_store(backend_from_url(url), namespace=namespace, clock=SYSTEM_CLOCK)

    @pytest.fixture
    def sibling(self, url: str, namespace: str) -> LockStore:
        return build_lock_store(backend_from_url(url), namespace=namespace, clock=SYSTEM_CLOCK)

    @pytest.fixture
    def neighbour(self, url: str, namespace: str) -> LockStore:
        return build_lock_store(backend_from_url(url), namespace=f"{namespace}2", clock=SYSTEM_CLOCK)


class TestRedis(OfServers):
    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    def url(self, redis_server: Server) -> str:
        return redis_server.url


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sequence[Server]]:
    with run_redis_cluster() as servers:
        yield servers


class TestRedisCluster(OfServers):
    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.fixture
    def url(self, cluster: Sequence[Server]) -> str:
        return f"redis+cluster://{','.join(f'127.0.0.1:{each.port}' for each in cluster)}"


class TestMemcached(OfServers):
    lag = 2.5

    @pytest.fixture
    def url(self, memcached_server: Server) -> str:
        return f"memcached://127.0.0.1:{memcached_server.port}"


@pytest.fixture(scope="module")
def two_memcacheds() -> Iterator[Sequence[Server]]:
    with run_memcached() as one, run_memcached() as two:
        yield one, two


class TestTwoMemcacheds(OfServers):
    lag = 2.5

    @pytest.fixture
    def url(self, two_memcacheds: Sequence[Server]) -> str:
        return f"memcached://{','.join(f'127.0.0.1:{each.port}' for each in two_memcacheds)}"
