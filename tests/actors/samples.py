"""Small actors for tests, and their messages."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import ClassVar

import anyio

from cachebus.actors import Actor
from cachebus.bus import DeferredReply
from cachebus.messages import CacheKeyError, Reply, Request


class Number(Reply, frozen=True, tag="test.number"):
    value: int


class Plain(Request[Number], frozen=True, tag="test.plain"):
    value: int = 0


class Again(Request[Number], frozen=True, tag="test.again"):
    """Idempotent request."""

    value: int = 0
    IDEMPOTENT: ClassVar[bool] = True


class Slow(Request[Number], frozen=True, tag="test.slow"):
    value: int = 0


class Drop(Request[Number], frozen=True, tag="test.drop"):
    """Invalidating request."""

    value: int = 0
    INVALIDATES: ClassVar[bool] = True


class Park(Request[Number], frozen=True, tag="test.park"):
    value: int = 0


class Unpark(Request[Number], frozen=True, tag="test.release"):
    pass


class Refuse(Request[Number], frozen=True, tag="test.refuse"):
    pass


class Crash(Request[Number], frozen=True, tag="test.crash"):
    pass


class Interrupt(Request[Number], frozen=True, tag="test.interrupt"):
    pass


class Shrug(Request[Number], frozen=True, tag="test.shrug"):
    pass


class Batched(Request[Number], frozen=True, tag="test.batched"):
    number: int = 0
    value: bytes = b""


class Strange(Request[Number], frozen=True, tag="test.strange"):
    """Request without a handler."""


class Desk:
    """State shared by a test and the incarnations of its actor."""

    def __init__(self) -> None:
        self.lives = 0
        self.handled: list[int] = []
        self.batches: list[int] = []
        self.gate = anyio.Event()
        self.crashes_left = 0
        self.overlaps = 0
        self.stopped = 0
        self._inside = threading.Lock()

    def turn(self) -> threading.Lock:
        """Return a lock that is held during a turn. A turn that finds it held overlaps another turn."""
        if not self._inside.acquire(blocking=False):
            self.overlaps += 1
            raise AssertionError("two turns overlap")
        return self._inside


class Clerk(Actor):
    """Actor with handlers of all kinds."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        desk.lives += 1
        self.parked: list[DeferredReply] = []

    async def on_stop(self) -> None:
        self.desk.stopped += 1

    def on_plain(self, request: Plain | Drop) -> Number:
        turn = self.desk.turn()
        try:
            self.desk.handled.append(request.value)
            return Number(request.value)
        finally:
            turn.release()

    def on_again(self, request: Again) -> Number:
        if self.desk.crashes_left:
            self.desk.crashes_left -= 1
            raise RuntimeError("a bug")
        self.desk.handled.append(request.value)
        return Number(request.value)

    async def on_slow(self, request: Slow) -> Number:
        turn = self.desk.turn()
        try:
            await self.desk.gate.wait()
            self.desk.handled.append(request.value)
            return Number(request.value)
        finally:
            turn.release()

    def on_park(self, request: Park) -> DeferredReply:
        self.parked.append(deferred := self.ctx.defer())
        return deferred

    def on_unpark(self, request: Unpark) -> Number:
        for value, deferred in enumerate(self.parked):
            deferred.answer(Number(value))
            deferred.answer(Number(-1))  # Only the first answer counts.
        return Number(len(self.parked))

    def on_refuse(self, request: Refuse) -> Number:
        raise CacheKeyError("the key is refused")

    def on_crash(self, request: Crash) -> Number:
        raise RuntimeError("a bug")

    def on_interrupt(self, request: Interrupt) -> Number:
        raise KeyboardInterrupt

    def on_shrug(self, request: Shrug) -> Number:
        return None  # type: ignore[return-value]


class Porter(Actor):
    """Actor with batch handlers."""

    max_batch = 4
    max_batch_bytes = 1000

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        desk.lives += 1

    async def on_batch(self, batch: Sequence[Batched]) -> Sequence[Number]:
        self.desk.batches.append(len(batch))
        await self.desk.gate.wait()
        self.desk.handled.extend(each.number for each in batch)
        if self.desk.crashes_left:
            self.desk.crashes_left -= 1
            return []
        if any(each.number < 0 for each in batch):
            raise CacheKeyError("a negative one")
        return [Number(each.number) for each in batch]

    def on_plain(self, request: Plain) -> Number:
        self.desk.handled.append(request.value)
        return Number(request.value)
