"""The servers that the paths are counted on."""

from __future__ import annotations

from cachebus.testing.servers import memcached_server, nats_server, redis_server

__all__ = ["memcached_server", "nats_server", "redis_server"]
