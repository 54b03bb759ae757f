"""Conformance suite for lock stores. A store that passes it can be used by a `LockManager`."""

from __future__ import annotations

from .suite.locking import LockConformance, managed

__all__ = ["LockStoreConformance", "managed"]


class LockStoreConformance(LockConformance):
    """Tests for every guarantee of the lock store port, for inline and batch stores. Subclass it for your store.

    ::

        class TestMyLocks(LockStoreConformance):
            @pytest.fixture
            def store(self) -> MyLocks:
                return MyLocks(namespace=uuid4().hex)

    If the store uses a server, also override the fixtures `sibling` and `neighbour`. If you can move the store's clock,
    override `clock` and `elapse`. If its locks end late, override `lag`. The suite opens and closes the stores through
    their lock managers. anyio's pytest plugin runs the tests: override the fixture `anyio_backend` to choose the event
    loop.
    """
