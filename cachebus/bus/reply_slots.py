"""Reply slots: one per request of a batch, filled together when the batch is answered.

A slot is much cheaper than a reply port. The slots of a batch share one deadline timer, and need no locks because a
batch belongs to one event loop.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from msgspec import Struct

from cachebus.messages import Failed, Reply, Request

from .clock import Bucket, Deadlines
from .reply_ports import DeferredReply, ReplyPort

_NEVER = float("inf")


class ReplySlot(Struct, eq=False):
    """Slot of one request in a batch. A turn returns it in place of a reply that is not available yet.

    A task on the event loop of the batch awaits `within`. All other callers attach a port.
    """

    batch: SlotBatch
    request: Request[Any]
    trace: str | None = None
    port: Any = None
    """Future of the batch's event loop, a `ReplyPort`, or `None` until the caller chooses one of them."""
    reply: Any = None
    deadline: float = _NEVER
    """Deadline of the caller, on the clock of the event loop."""
    late: Callable[[], Failed] | None = None

    def within(self, timeout: float, late: Callable[[], Failed]) -> Future[Any]:
        """Return a future of the reply, or of `late()` after `timeout` seconds. Call `leave` if you stop waiting."""
        batch = self.batch
        deadlines = batch.deadlines
        assert deadlines is not None
        future: Future[Any] = Future(loop=deadlines.loop)
        self.port = future
        if self.reply is not None:
            future.set_result(self.reply)
            return future
        self.late = late
        self.deadline = deadline = deadlines.now() + timeout
        if deadline < batch.due:  # Inlined from `watch`, to save a call.
            if batch.bucket is not None:
                batch.bucket.pop(batch, None)
            batch.due = deadline
            batch.bucket = deadlines.watch(batch, timeout, _nothing)
        return future

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline of the caller."""
        deadlines = self.batch.deadlines
        return _NEVER if deadlines is None else self.deadline - deadlines.now()

    def attach(self, port: ReplyPort) -> None:
        """Set the port that receives the reply."""
        self.port = port
        if self.reply is not None:
            port.answer(self.reply)

    @property
    def waiting(self) -> bool:
        """`True` if the caller may still wait for the reply."""
        port = self.port
        if type(port) is Future:
            return not port.done()
        return self.reply is None and (port is None or port.waiting)

    def leave(self) -> None:
        """Record that the caller stopped waiting."""
        self.batch.gone += 1

    def give(self, reply: Any) -> None:
        """Fill the slot. Only the first reply counts."""
        port = self.port
        kind: object = port.__class__
        if kind is Future:
            if not port.done():
                port.set_result(reply)
        elif self.reply is None:
            self.reply = reply
            if port is not None:
                port.answer(reply)


class SlotBatch(Struct, eq=False):
    """Batch of requests that are sent together, with the slots of their replies. Belongs to one event loop.

    `size` is the total size of the values in the requests, in bytes. `gone` counts the callers that may have stopped
    waiting. `deadline` is the earliest deadline of the requests with ports, on the clock of the bus. `due` is the
    earliest deadline of the other requests, on the clock of the event loop. Without `deadlines` (on trio), slots cannot
    be awaited.
    """

    deadlines: Deadlines | None
    slots: list[ReplySlot] = []
    size: int = 0
    gone: int = 0
    deadline: float | None = None
    due: float = _NEVER
    bucket: Bucket | None = None

    def __repr__(self) -> str:
        return f"<SlotBatch of {len(self.slots)} requests, {self.gone} gone>"

    def answer(self, reply: Any) -> None:
        """Answer the slots whose deadline has passed. Called by the deadline timer, which ignores `reply`."""
        assert self.deadlines is not None
        self.bucket = None
        self.due = _NEVER
        now, following = self.deadlines.now(), _NEVER
        for slot in self.slots:
            if slot.late is None or slot.port.done():
                continue
            if slot.deadline <= now:
                slot.port.set_result(slot.late())
                self.gone += 1
            elif slot.deadline < following:
                following = slot.deadline
        self.watch(following)

    def watch(self, instant: float) -> None:
        """Schedule `answer` for an instant of the event loop's clock, unless it is scheduled earlier."""
        if instant < self.due:
            assert self.deadlines is not None
            if self.bucket is not None:
                self.bucket.pop(self, None)
            self.due = instant
            self.bucket = self.deadlines.watch(self, instant - self.deadlines.now(), _nothing)

    def unwatch(self) -> None:
        """Cancel the timer."""
        if self.bucket is not None:
            self.bucket.pop(self, None)
            self.bucket = None
            self.due = _NEVER

    def drop_gone(self) -> None:
        """Remove the requests whose callers stopped waiting, except invalidations."""
        self.slots = [slot for slot in self.slots if slot.request.INVALIDATES or slot.waiting]

    def settle(self, replies: Sequence[Reply]) -> None:
        """Fill the slots with replies, in order."""
        if self.bucket is not None:
            self.bucket.pop(self, None)
            self.bucket = None
        slots, self.slots = self.slots, []  # Breaks a reference cycle, and prevents a second reply.
        for slot, reply in zip(slots, replies, strict=True):
            port = slot.port
            kind: object = port.__class__
            if kind is Future:
                if not port.done():
                    port.set_result(reply)
            elif slot.reply is None:
                slot.reply = reply
                if port is not None:
                    port.answer(reply)

    def fail(self, failed: Failed) -> None:
        """Fill every slot that has no reply yet with the same failure."""
        self.settle([failed] * len(self.slots))

    def seconds_left(self, now: float, *, longest: bool = False) -> float | None:
        """Return the seconds until the earliest deadline, or the latest with `longest`; `None` if there is no deadline.

        `now` is the current time on the clock of the bus.
        """
        left: list[float] = [] if self.deadline is None else [self.deadline - now]
        if self.deadlines is not None and self.due < _NEVER:
            here = self.deadlines.now()
            left += [slot.deadline - here for slot in self.slots if slot.late is not None]
        if not left:
            return None
        return max(left) if longest else min(left)


def _nothing() -> None:
    pass


Pending: TypeAlias = DeferredReply | ReplySlot
PENDING = (DeferredReply, ReplySlot)
"""Classes that a turn returns in place of a reply that is not available yet. Each has `attach` and `waiting`."""
