from __future__ import annotations

from cachebus.testing.servers import memcached_server

__all__ = ["memcached_server"]
