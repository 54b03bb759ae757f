"""The contract of lock stores, as tests: subclass `LockStoreConformance`, and your store may stand behind a `LockManager`."""

from __future__ import annotations

from .suite.locking import LockConformance, managed

__all__ = ["LockStoreConformance", "managed"]


class LockStoreConformance(LockConformance):
    """Every guarantee of the lock store's port, for stores of both kinds.

    ::

        class TestMyLocks(LockStoreConformance):
            @pytest.fixture
            def store(self) -> MyLocks:
                return MyLocks(namespace=uuid4().hex)

    A store of a server also overrides the fixtures `sibling` and `neighbour`; one whose clock can be moved `clock` and
    `elapse`; one whose locks end late `lag`. The suite opens and closes the stores, by way of their managers. The tests are
    run by anyio's pytest plugin: override the fixture `anyio_backend` to choose the event loop.
    """
