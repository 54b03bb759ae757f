"""Test utilities: conformance suites, real servers, a faulty proxy, and fakes.

Only this package imports pytest, and no other part of cachebus imports this package.

* `stores.StoreConformance` and `locks.LockStoreConformance`: test classes to subclass for your own store.
* `servers`: Redis, Memcached and NATS as fixtures and context managers.
* `proxy.Proxy`: a TCP proxy that injects network faults between a client and a server.
* `fakes`: stores that fail or keep nothing, and a context to test an actor without a bus.
"""

import pytest

# Rewrite the asserts of the suite, so that failures show the compared values in other projects too.
pytest.register_assert_rewrite("cachebus.testing.suite")
