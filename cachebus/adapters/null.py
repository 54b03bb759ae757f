"""The null store, which keeps nothing. The application runs as if it had no cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from cachebus.actors.ports import Capabilities, DeferredReply, Gauges, ReadListener, RemovalListener, WriteListener
from cachebus.messages import (
    Add,
    Clear,
    Cleared,
    CompareAndSet,
    Delete,
    Deleted,
    DeleteMany,
    DeletePattern,
    Exists,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Incremented,
    Invalidated,
    InvalidateTags,
    Missing,
    NotStored,
    Reply,
    Request,
    Scan,
    Scanned,
    Set,
    SetMany,
    Stored,
    StoredMany,
    Sweep,
    Touch,
)


class NullStore:
    """An `InlineStore` in which every key is missing.

    Writes are accepted and discarded. The reply is `Stored` with version 0 if the write's condition holds for a missing
    key. Reads count as misses and call `on_read`. Writes are not counted and do not call `on_write`.
    """

    name = "null"
    capabilities = Capabilities(patterns=True, tags=True, compare_and_set=True, counters=True)

    def __init__(self) -> None:
        self.on_read: ReadListener | None = None
        self.on_write: WriteListener | None = None
        self.on_removal: RemovalListener | None = None
        self.on_due: Callable[[float], None] | None = None
        self._misses = 0
        self._verbs: Mapping[type[Request[Any]], Callable[[Any], Reply]] = {
            Get: self._get,
            GetMany: self._get_many,
            Exists: lambda _: Missing(),
            Set: lambda request: NotStored() if request.only_if == "present" else Stored(),
            SetMany: lambda request: StoredMany(len(request.items)),
            Add: lambda _: Stored(),
            CompareAndSet: lambda _: NotStored(),
            Touch: lambda _: Missing(),
            Increment: self._increment,
            **dict.fromkeys((Delete, DeleteMany, DeletePattern, Sweep), lambda _: Deleted(0)),
            Scan: lambda _: Scanned(()),
            InvalidateTags: lambda _: Invalidated(),
            Clear: lambda _: Cleared(),
        }

    def __repr__(self) -> str:
        return f"<NullStore {self._misses} misses>"

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Do nothing."""

    def verb(self, kind: type[Request[Any]]) -> Callable[[Any], Reply] | None:
        return self._verbs.get(kind)

    def gauges(self) -> Gauges:
        return Gauges(misses=self._misses, max_entries=0, max_bytes=0)

    def repair(self) -> Collection[DeferredReply]:
        return ()

    def next_expiry(self) -> float | None:
        return None

    def sweep(self, limit: int) -> int:
        return 0

    def _get(self, request: Get) -> Missing:
        self._misses += 1
        if self.on_read is not None:
            self.on_read(request.key, False)
        return Missing()

    def _get_many(self, request: GetMany) -> FoundMany:
        for key in dict.fromkeys(request.keys):
            self._get(Get(key))
        return FoundMany({})

    def _increment(self, request: Increment) -> Incremented | Missing:
        return Missing() if request.initial is None else Incremented(request.initial + request.delta)
