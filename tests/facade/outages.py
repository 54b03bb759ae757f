"""A store whose failures the test controls, behind the guard and the facade."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cachebus.actors.ports import Capabilities, Gauges
from cachebus.adapters.chaos import ChaosStore
from cachebus.adapters.memory.store import MemoryStore
from cachebus.bus import ReplyPort, open_port
from cachebus.messages import CacheConnectionError, CacheError, Failed, Reply, Request


class Outage:
    """Batch store over memory. While `error` is set, batches raise it. While `silent` is true, no batch is answered.

    `asked` holds the received batches, and `opens` counts the calls of `open`. With `lose_replies`, the store carries
    out a batch and loses the replies.
    """

    name = "outage"
    capabilities = Capabilities()

    def __init__(self) -> None:
        self.inner = ChaosStore(MemoryStore(), seed=1)
        self.asked: list[Sequence[Request[Any]]] = []
        self.opens = 0
        self.error: CacheError | None = None
        self.silent = False
        self.fails: Callable[[Request[Any]], CacheError | None] = lambda request: None
        self.silenced: list[ReplyPort] = []

    async def open(self) -> None:
        self.opens += 1
        if self.error is not None:
            raise self.error
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    def gauges(self) -> Gauges:
        return self.inner.gauges()

    def lose_replies(self) -> None:
        self.inner.lost_reply_rate = 1.0

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        self.asked.append(list(batch))
        if self.silent:
            port = open_port()
            self.silenced.append(port)
            await port.wait()
        if self.error is not None:
            raise self.error
        replies = await self.inner.execute(batch)
        return [
            reply if (error := self.fails(request)) is None else Failed.of(error)
            for request, reply in zip(batch, replies, strict=True)
        ]


def down(detail: str = "nobody is there") -> CacheConnectionError:
    """Return the error of an unreachable server."""
    return CacheConnectionError(detail, "outage")
