from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from cachebus.testing.servers import memcached_server, nats_server, redis_server

__all__ = ["memcached_server", "nats_server", "redis_server"]


@pytest.fixture(scope="session", autouse=True)
def pydantic_has_looked_for_plugins() -> None:
    """The first adapter of a process reads the metadata of every installed package, which blocks. A cache that has a
    codec makes it when it is opened; a store alone has nobody who does."""
    TypeAdapter(int)
