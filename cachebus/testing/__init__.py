"""What ships for tests: real servers, a proxy that breaks connections, the suite that every store must pass, and fakes.

Only this package imports pytest, and nothing else of cachebus imports this package.

* `stores.StoreConformance`, a class of tests to subclass: your store passes it, and then it can stand behind a cache.
* `servers`: Redis, Memcached and NATS as fixtures and context managers.
* `proxy.Proxy`: between a client and a server, to break what is between them.
* `fakes`: stores that fail or forget on purpose, and a context for testing an actor without a bus.
"""

import pytest

# Their asserts shall say what was compared, in other people's test runs too.
pytest.register_assert_rewrite("cachebus.testing.suite")
