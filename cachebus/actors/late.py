"""A store whose server is not there yet: it is opened with the first batch that finds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anyio

from cachebus.messages import Reply, Request

from .ports import BatchStore, PipelinedStore, Replied


class LateStore:
    """Stands for a store that could not be opened, and opens it before it hands a batch on.

    What opening raises is what the batch gets, so that the guard judges it like any other failure. `opened` is called
    once it is open; from then on the store itself may be asked.
    """

    def __init__(self, store: BatchStore, opened: Callable[[], None]) -> None:
        self._store = store
        self._opened = opened
        self._is_open = False
        self._opening = anyio.Lock()

    def __repr__(self) -> str:
        return f"<LateStore {'open' if self._is_open else 'not open yet'}, {self._store!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        """As `BatchStore.execute`."""
        await self._open()
        return await self._store.execute(batch)

    async def submit(self, batch: Sequence[Request[Any]], replied: Replied) -> None:
        """As `PipelinedStore.submit`."""
        await self._open()
        assert isinstance(self._store, PipelinedStore)
        await self._store.submit(batch, replied)

    def submit_at_once(self, batch: Sequence[Request[Any]], replied: Replied) -> bool:
        """As `PipelinedStore.submit_at_once`: opening has to be waited for."""
        return False

    async def _open(self) -> None:
        async with self._opening:
            if not self._is_open:
                await self._store.open()
                self._is_open = True
                self._opened()
