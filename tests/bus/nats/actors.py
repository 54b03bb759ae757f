"""Actors for tests, in this process and in others."""

from __future__ import annotations

import os
from collections.abc import Sequence

import anyio

from cachebus.actors import Actor
from cachebus.bus import DeferredReply
from cachebus.messages import (
    CacheKeyError,
    Delete,
    Deleted,
    Exists,
    Found,
    FoundMany,
    Get,
    GetMany,
    Increment,
    Incremented,
    Missing,
    Present,
    Set,
    Stored,
    Touch,
)


class Answering(Actor):
    """Actor with plain, waiting, parking, refusing and crashing handlers.

    `Get("pid")` returns the process id, `Get("large:N")` returns N bytes, and any other `Get` its key. `Exists` waits
    for the seconds in its key. `Touch` is parked until the next `Increment`.
    """

    def __init__(self) -> None:
        self.parked: list[DeferredReply] = []
        self.count = 0

    def on_get(self, request: Get) -> Found | Missing:
        if request.key == "pid":
            return Found(os.getpid())
        if request.key.startswith("large:"):
            return Found(bytes(int(request.key[6:])))
        if request.key == "object":
            return Found(object())
        if request.key == "missing":
            return Missing()
        return Found(request.key)

    async def on_exists(self, request: Exists) -> Present | Missing:
        await anyio.sleep(float(request.key))
        return Present()

    def on_touch(self, request: Touch) -> DeferredReply:
        self.parked.append(deferred := self.ctx.defer())
        return deferred

    def on_increment(self, request: Increment) -> Incremented:
        self.count += 1
        for deferred in self.parked:
            deferred.answer(Present(float(self.count)))
        self.parked.clear()
        return Incremented(self.count)

    def on_set(self, request: Set) -> Stored:
        raise CacheKeyError("the key is refused")

    def on_delete(self, request: Delete) -> Deleted:
        raise RuntimeError("a bug")

    async def on_many(self, batch: Sequence[GetMany]) -> Sequence[FoundMany]:
        return [FoundMany({key: Found(len(batch)) for key in each.keys}) for each in batch]
