"""The contract of stores, as tests: subclass `StoreConformance`, and your store may stand behind a cache."""

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
    """Every guarantee of the store's port, for stores of both kinds.

    ::

        class TestMyStore(StoreConformance):
            @pytest.fixture
            async def store(self) -> AsyncIterator[MyStore]:
                store = MyStore(namespace=uuid4().hex)
                await store.open()
                yield store
                await carry_out(store, [Clear()])
                await store.close()

    A store of a server also overrides the fixture `neighbour` with a second one, of another namespace on the same
    server; a store whose clock can be moved overrides `elapse` and `now`. Where a store says in its `capabilities` that
    it cannot do something, the tests of that are skipped, and another makes sure that it refuses. The tests are run by
    anyio's pytest plugin: override the fixture `anyio_backend` to choose the event loop.
    """
