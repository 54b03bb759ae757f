"""Conformance suite for stores. A store that passes it can be used by a cache."""

from __future__ import annotations

from .suite.base import MISSING, AnyStore, ask, carry_out, value_of
from .suite.batching import Batching
from .suite.expiry import Counting
from .suite.leasing import Leasing
from .suite.limiting import Limiting
from .suite.reading import Reading
from .suite.removing import Removing
from .suite.tagging import Tagging
from .suite.writing import Writing

__all__ = ["MISSING", "AnyStore", "StoreConformance", "ask", "carry_out", "value_of"]


class StoreConformance(Reading, Writing, Counting, Removing, Batching, Leasing, Tagging, Limiting):
    """Tests for every guarantee of the store port, for inline and batch stores. Subclass it for your store.

    ::

        class TestMyStore(StoreConformance):
            @pytest.fixture
            async def store(self) -> AsyncIterator[MyStore]:
                store = MyStore(namespace=uuid4().hex)
                await store.open()
                yield store
                await carry_out(store, [Clear()])
                await store.close()

    If the store uses a server, also override the fixture `neighbour` with a store in another namespace of the same
    server. If you can move the store's clock, override `elapse` and `now`. Tests of capabilities that the store does
    not declare are skipped; another test checks that it rejects such requests. anyio's pytest plugin runs the tests:
    override the fixture `anyio_backend` to choose the event loop.
    """
