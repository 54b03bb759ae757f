"""Reply slots: one for each request of a batch, filled together when the batch is answered.

A slot is much cheaper than a reply port: the slots of a batch share one deadline timer, and nothing is locked, because a
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
    """The place of one request in a batch. A turn returns it in place of a reply that comes later.

    A task of the batch's own loop awaits `within`; everyone else attaches a port.
    """

    batch: SlotBatch
    request: Request[Any]
    trace: str | None = None
    port: Any = None
    """A future of the batch's loop, a `ReplyPort`, or `None` until the caller has said where the reply goes."""
    reply: Any = None
    deadline: float = _NEVER
    """On the clock of the event loop."""
    late: Callable[[], Failed] | None = None

    def within(self, timeout: float, late: Callable[[], Failed]) -> Future[Any]:
        """A future of the reply, or of `late()` after `timeout` seconds. The caller calls `leave` if it stops waiting."""
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
        if deadline < batch.due:  # As `watch` does, less a call.
            if batch.bucket is not None:
                batch.bucket.pop(batch, None)
            batch.due = deadline
            batch.bucket = deadlines.watch(batch, timeout, _nothing)
        return future

    @property
    def seconds_left(self) -> float:
        """Until the caller's deadline."""
        deadlines = self.batch.deadlines
        return _NEVER if deadlines is None else self.deadline - deadlines.now()

    def attach(self, port: ReplyPort) -> None:
        """Name the port that the reply goes to."""
        self.port = port
        if self.reply is not None:
            port.answer(self.reply)

    @property
    def waiting(self) -> bool:
        """Whether the caller may still wait for the reply."""
        port = self.port
        if type(port) is Future:
            return not port.done()
        return self.reply is None and (port is None or port.waiting)

    def leave(self) -> None:
        """Note that the caller has gone."""
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
    """Requests that are sent together, and the slots of their replies. Belongs to one event loop.

    `size` is the bytes of the values that the requests carry. `gone` counts callers that may have stopped waiting. `deadline` is the
    earliest one of requests with ports of their own, on the bus's clock; `due` the earliest one of the others, on that of the
    event loop. Without `deadlines` (on trio) no slot may be awaited.
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
        """Called by the deadline timer: answer the slots whose time is up."""
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
        """Let the timer call `answer` at an instant of the event loop's clock, if it would be later otherwise."""
        if instant < self.due:
            assert self.deadlines is not None
            if self.bucket is not None:
                self.bucket.pop(self, None)
            self.due = instant
            self.bucket = self.deadlines.watch(self, instant - self.deadlines.now(), _nothing)

    def unwatch(self) -> None:
        """Need the timer no more."""
        if self.bucket is not None:
            self.bucket.pop(self, None)
            self.bucket = None
            self.due = _NEVER

    def drop_gone(self) -> None:
        """Take out the requests whose callers have gone, except those that invalidate."""
        self.slots = [slot for slot in self.slots if slot.request.INVALIDATES or slot.waiting]

    def settle(self, replies: Sequence[Reply]) -> None:
        """Fill the slots, in order."""
        if self.bucket is not None:
            self.bucket.pop(self, None)
            self.bucket = None
        slots, self.slots = self.slots, []  # No circle for the garbage collector, and no second answer.
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
        """Until the first caller's deadline, or the last one's with `longest`; `None` without one. `now` is the time on the
        bus's clock."""
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
"""The classes of what a turn returns in place of a reply that comes later. Each has `attach` and `waiting`."""
