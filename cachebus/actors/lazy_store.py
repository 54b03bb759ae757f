"""A store whose server is not reachable yet: the first batch that reaches it opens it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import anyio

from cachebus.messages import Reply, Request

from .ports import BatchStore, OnReplies, PipelinedStore, Progress


class LazyStore:
    """Opens a store before it hands the first batch on.

    The batch gets the error of opening, so that the guard judges it like any other failure. `opened` is called once the
    store is open; from then on the store itself may be asked.
    """

    def __init__(self, store: BatchStore, opened: Callable[[], None]) -> None:
        self._store = store
        self._opened: Callable[[], None] | None = opened  # `None` once it is open.
        self._opening = anyio.Lock()

    def __repr__(self) -> str:
        return f"<LazyStore {'not open yet' if self._opened else 'open'}, {self._store!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        await self._open()
        return await self._store.execute(batch)

    def try_submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> None:
        """Do nothing: opening has to be waited for."""

    async def submit(self, batch: Sequence[Request[Any]], on_replies: OnReplies) -> Progress:
        await self._open()
        assert isinstance(self._store, PipelinedStore)
        return await self._store.submit(batch, on_replies)

    async def _open(self) -> None:
        async with self._opening:
            if self._opened is not None:
                await self._store.open()
                opened, self._opened = self._opened, None
                opened()
