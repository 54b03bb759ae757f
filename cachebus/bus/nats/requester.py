"""The asking side of a bus over NATS: requests to one address travel together, and come back as they are answered.

A request waits in a slot of a `RequestBatch`, and leaves with what else comes up by the next step of the loop. While
`window` messages are unanswered it waits for one of their answers, or for 10 ms without any: the worker that took them
may be dead, and others may serve the address too. A caller on the loop of the bus puts its request there by itself and
awaits the slot; requests from other threads are posted.

    token                 one message in flight, a `RequestBatch`; answers come to `<inbox>.<token>`
    Cachebus-Budget       the seconds left, one number, or one for each request of an array if they differ
    Cachebus-Sent         who sends, and when by its clock, so that the receiver can estimate the age of the message
    traceparent           the W3C trace context of the request; of those of an array, if it is the same
    Cachebus-Traceparents the trace contexts of an array if they differ, one for each request or empty
    Cachebus-Partial      an array may be answered bit by bit
    Cachebus-Index        in an answer: which requests of the array it answers; all, if it is left out

An idempotent request that is not answered within `resend_after` seconds is sent once more. The others are never sent
twice.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from asyncio import Future
from collections import deque
from itertools import accumulate
from threading import get_ident
from typing import Any

from msgspec import Struct

from cachebus.messages import (
    BadMessage,
    CacheCapacityError,
    CacheClosed,
    CacheError,
    CacheSerializationError,
    DeadLetter,
    Failed,
    Get,
    Message,
    Missing,
    NoSuchActor,
    Overloaded,
    Reply,
)

from ..api import Envelope, Turn
from ..clock import Clock, Deadlines, deadlines_here
from ..codec.messages import MSGPACK, decode_each, encode
from ..compat import running_loop
from ..events.emitter import Emitter
from ..reply_slots import ReplySlot, SlotBatch
from ..tracing import current_trace
from .compat import Delivery
from .connection import NatsConnection, age_clock
from .headers import BUDGET, CONTENT_TYPE, INDEX, PARTIAL, SENT, write_budgets, write_traces

HEADROOM = 4096  # Bytes of a NATS message that are left to headers.
_FEW = 16  # Requests that are not worth two messages.
_NEVER = float("inf")
_NONE: dict[str, str] = {}
_HOLD = 0.01  # Seconds without an answer after which requests wait no longer for one.


class RequestBatch(SlotBatch, eq=False, kw_only=True):
    """The requests of one NATS message, which waits to be sent or is in flight. `end` and `resend_at` are on the clock of the
    event loop, as deadlines are."""

    recipient: RemoteRecipient
    token: str = ""
    unanswered: int = 0
    end: float = _NEVER
    resend_at: float = _NEVER
    answered: bool = False  # At least in part, or given up as lost.

    def answer(self, reply: Any) -> None:
        """Called by the deadline timer: answer the slots whose time is up, and send again what may be sent again."""
        super().answer(reply)
        self.recipient.overdue(self)

    def drop_late(self, now: float) -> None:
        """Take out the requests whose time is up or whose callers have gone, except those that invalidate in time."""
        slots, self.slots = self.slots, []
        for slot in slots:
            if slot.deadline <= now:
                if slot.late is not None:
                    slot.give(slot.late())
            elif slot.waiting or getattr(slot.request, "INVALIDATES", False):
                self.slots.append(slot)


class DeadLetters(Struct, eq=False):
    """The port of a message that was sent without a caller: a failure becomes an event."""

    recipient: RemoteRecipient
    message: Message
    waiting: bool = True

    def answer(self, reply: Any) -> None:
        if type(reply) is Failed:
            self.recipient.report(self.message, reply.detail)


class Requests:
    """The inbox of one bus, and its remote recipients."""

    def __init__(self, connection: NatsConnection, clock: Clock, emitter: Emitter) -> None:
        self.connection = connection
        self.options = connection.options
        self.now = clock.monotonic
        self.age_now = age_clock(clock)
        self.emitter = emitter
        self.counters = connection.counters
        self.in_flight: dict[str, RequestBatch] = {}
        self.loop = asyncio.get_running_loop()
        self.thread = get_ident()
        self.deadlines: Deadlines = deadlines_here()
        self.closed = False
        self.name = secrets.token_hex(11)
        self.inbox = f"{self.options.inbox_prefix}.{self.name}."
        self.tokens = itertools.count(1)
        self.recipients: dict[str, RemoteRecipient] = {}

    async def open(self) -> None:
        """Listen for answers."""
        await self.connection.listen(f"{self.inbox}*", self._take)

    def end(self, error: CacheError) -> None:
        """Answer everything that is in flight or waits with an error."""
        for batch in list(self.in_flight.values()):
            batch.recipient.give_up(batch, error)
        for recipient in self.recipients.values():
            recipient.refuse(error)

    def head(self, budgets: list[float], traces: list[str | None]) -> bytes:
        """The headers of a message with one request or several."""
        partial = f"{PARTIAL}: 1\r\n" if len(budgets) > 1 else ""
        traced = write_traces(traces) if any(traces) else ""
        sent = f"{SENT}: {self.name} {self.age_now():.6f}\r\n"
        return f"NATS/1.0\r\n{BUDGET}: {write_budgets(budgets)}\r\n{sent}{partial}{traced}\r\n".encode()

    def _take(self, delivery: Delivery) -> None:
        batch = self.in_flight.get(delivery.subject[len(self.inbox) :])
        if batch is None:
            self.counters.late_replies += 1
        else:
            batch.recipient.take(batch, delivery)


class RemoteRecipient:
    """A `Recipient` for an address that another process serves."""

    def __init__(self, address: str, subject: str, requests: Requests) -> None:
        self._address = address
        self._subject = subject
        self._requests = requests
        self._waiting: deque[RequestBatch] = deque()  # The last one takes what comes next, until it is full.
        self._count = 0  # Requests that wait.
        self._in_flight = 0  # Batches without any answer so far,
        self._unanswered = 0  # and the requests that are in them.
        self._bytes_each = 0.0  # Of the requests of the last batch, so that the next one has the right size at once.
        self._scheduled = 0  # Calls of `_flush` that are to come.
        self._held = False
        self._moved = False  # Since the hold began, an answer came.

    def __repr__(self) -> str:
        return f"<RemoteRecipient {self._address}, {self._count} waiting, {self._in_flight} messages in flight>"

    # For the bus

    def turn(self, kind: type[Message]) -> Turn:
        return self.take_turn

    def take_turn(self, message: Any) -> ReplySlot | Failed | None:
        """Let a message wait to be sent. `None` on another thread, which has to post it."""
        requests, waiting = self._requests, self._waiting
        if get_ident() != requests.thread or requests.closed:
            return None
        options = requests.options
        if self._count >= options.max_waiting and not getattr(message, "INVALIDATES", False):
            return Failed.of(Overloaded(address=self._address, capacity=options.max_waiting))
        batch = waiting[-1] if waiting else None
        if batch is None or len(batch.slots) >= options.batch or batch.size >= options.batch_bytes:
            batch = RequestBatch(requests.deadlines, recipient=self)
            waiting.append(batch)
            if self._in_flight >= options.window:
                self._hold()
            elif not self._scheduled:  # As `_flush_soon` does, less a call for each lone request.
                self._scheduled = 1
                requests.loop.call_soon(self._flush)
        if type(message) is not Get:
            batch.size += _size(message)
        slot = ReplySlot(batch, message, current_trace())
        batch.slots.append(slot)
        self._count += 1
        return slot

    def post(self, envelope: Envelope) -> None:
        requests = self._requests
        port = envelope.port or DeadLetters(self, envelope.message)
        slot: ReplySlot | Failed | None = Failed.of(CacheClosed("the bus is closed"))
        if get_ident() != requests.thread:
            try:
                requests.loop.call_soon_threadsafe(self.post, envelope)
            except RuntimeError:  # The loop is closed.
                port.answer(slot)
            return
        slot = self.take_turn(envelope.message) or slot
        if type(slot) is not ReplySlot:
            port.answer(slot)
            return
        slot.trace = envelope.trace
        slot.port = port
        slot.batch.gone += 1  # Its port does not say so when the caller goes.
        if envelope.deadline is not None:
            slot.deadline = envelope.deadline - requests.now() + requests.deadlines.now()

    def obstacle_to_blocking(self) -> str | None:
        obstacle = "it would stop the event loop of this thread; await an asynchronous cache, or use another thread"
        return None if running_loop() is None else obstacle

    # Out

    def _flush_soon(self) -> None:
        self._scheduled += 1
        self._requests.loop.call_soon(self._flush)

    def _hold(self) -> None:
        if not self._held:
            self._held, self._moved = True, False
            self._requests.loop.call_later(_HOLD, self._end_hold)

    def _end_hold(self) -> None:
        self._held = False
        if self._waiting and not self._moved:
            self._send(self._requests.options.window)
        if self._waiting:
            self._hold()

    def _flush(self) -> None:
        self._scheduled -= 1
        # The flushes to come have a message each, for the callers that another answer wakes.
        window = max(1, self._requests.options.window - self._scheduled)
        while self._waiting and self._in_flight < window:
            self._send(window)
        if self._waiting:
            self._hold()

    def _send(self, window: int) -> None:
        """Send a message of what has waited longest: no more than its share of all there are, because one message is worked
        on there while we work on the other here."""
        requests = self._requests
        options = requests.options
        now = requests.deadlines.now()
        batch = self._waiting.popleft()
        share = -(-(self._count + self._unanswered) // window)
        self._count -= len(batch.slots)
        if batch.gone or batch.due <= now:
            batch.drop_late(now)
        limit = min(options.batch_bytes, requests.connection.max_payload - HEADROOM)
        most = min(options.batch, max(_FEW, share))
        if self._bytes_each * most > limit:
            most = max(1, int(limit / self._bytes_each))
        if batch.size > limit:
            sizes = accumulate(_size(slot.request) for slot in batch.slots)
            most = min(most, max(1, sum(size <= limit for size in sizes)))
        if len(batch.slots) > most:
            self._put_back(batch, most)
        try:
            if requests.closed:
                raise CacheClosed("the bus is closed")
            if (body := self._encoded(batch)) is None:
                batch.unwatch()
                return
            slots = batch.slots
            budgets = [slot.deadline - now if slot.deadline < _NEVER else options.budget for slot in slots]
            batch.token = f"{next(requests.tokens):x}"
            requests.connection.write(
                self._subject,
                body,
                requests.inbox + batch.token,
                requests.head(budgets, [slot.trace for slot in slots]),
            )
        except CacheError as error:
            batch.fail(Failed.of(error))
            return
        requests.in_flight[batch.token] = batch
        self._in_flight += 1
        self._unanswered += len(slots)
        requests.counters.messages_sent += 1
        requests.counters.requests_sent += len(slots)
        batch.unanswered = len(slots)
        batch.end = now + max(budgets)
        batch.resend_at = now + options.resend_after
        batch.watch(min(batch.end, batch.resend_at))

    def _put_back(self, batch: RequestBatch, most: int) -> None:
        """Let the requests of a batch beyond so many wait again, before all others."""
        rest = RequestBatch(self._requests.deadlines, recipient=self, slots=batch.slots[most:], gone=batch.gone)
        del batch.slots[most:]
        for slot in rest.slots:
            rest.size += _size(slot.request)
            if slot.batch is batch:  # Not if it is sent again.
                slot.batch = rest
        rest.watch(batch.due)
        self._waiting.appendleft(rest)
        self._count += len(rest.slots)

    def _encoded(self, batch: RequestBatch) -> bytes | None:
        """The body for a batch, which is shortened to what can travel; `None` if nothing of it can."""
        most = self._requests.connection.max_payload - HEADROOM
        limit = min(self._requests.options.batch_bytes, most)
        while count := len(batch.slots):
            try:
                body = encode(batch.slots[0].request if count == 1 else [slot.request for slot in batch.slots])
            except CacheSerializationError:
                self._refuse_unfit(batch)
                continue
            self._bytes_each = len(body) / count
            if len(body) <= limit or (count == 1 and len(body) <= most):
                return body
            if count == 1:
                error = CacheCapacityError("the request is too large for the bus", len(body), most)
                batch.slots.pop().give(Failed.of(error))
            else:
                self._put_back(batch, min(count - 1, max(1, int(limit / self._bytes_each))))
        return None

    def _refuse_unfit(self, batch: RequestBatch) -> None:
        """Fail each request of a batch that cannot be encoded. The others stay."""
        slots, batch.slots = batch.slots, []
        for slot in slots:
            try:
                encode(slot.request)
                batch.slots.append(slot)
            except CacheSerializationError as error:
                slot.give(Failed.of(error))

    # Back

    def take(self, batch: RequestBatch, delivery: Delivery) -> None:
        """Take an answer to a batch."""
        headers = delivery.headers if delivery.head else _NONE
        self._landed(batch)
        if headers.get("Status") == "503":
            self.give_up(batch, NoSuchActor(address=self._address))
            return
        slots, counters = batch.slots, self._requests.counters
        try:
            replies, is_array = decode_each(delivery.data, headers.get(CONTENT_TYPE, MSGPACK))
            if not is_array:
                replies = replies * len(slots)
            index = headers.get(INDEX) if is_array else None
            places = range(len(slots)) if index is None else map(int, index.split(","))
            reply: Any
            for place, reply in zip(places, replies, strict=True):
                slot = slots[place]
                if slot is _ANSWERED:
                    continue
                slots[place] = _ANSWERED
                batch.unanswered -= 1
                if not isinstance(reply, Reply):
                    reply = Failed.of(_no_reply(reply))
                port = slot.port
                kind: object = port.__class__
                if kind is Future and not port.done():  # As `give` does, less a call for each answer.
                    port.set_result(reply)
                elif slot.waiting:
                    slot.give(reply)
                else:
                    counters.late_replies += 1
        except CacheError as error:
            self.give_up(batch, error)
        except (ValueError, IndexError):
            self.give_up(batch, BadMessage("the answer does not fit the requests"))
        else:
            if not batch.unanswered:  # As `_forget` does, less two calls.
                self._requests.in_flight.pop(batch.token, None)
                if batch.bucket is not None:
                    batch.bucket.pop(batch, None)
            # After the callers were woken, so that what they ask next leaves together.
            self._flush_soon()

    def overdue(self, batch: RequestBatch) -> None:
        """Send again what may be sent again; give up what has no time left."""
        requests = self._requests
        if requests.in_flight.get(batch.token) is not batch:
            return
        now = requests.deadlines.now()
        if batch.due < _NEVER:  # A caller that came to wait after its request was sent.
            batch.end = max(batch.end, batch.due)
        if now >= batch.end:
            self._landed(batch)
            self._forget(batch)
            self._flush_soon()
        elif now < batch.resend_at:
            batch.watch(min(batch.end, batch.resend_at))
        else:
            self._landed(batch)
            batch.resend_at = _NEVER
            batch.watch(batch.end)
            again = [slot for slot in batch.slots if slot.batch is batch and getattr(slot.request, "IDEMPOTENT", False)]
            if again:
                requests.counters.requests_resent += len(again)
                # Callers that go tell their own batch, not this one.
                self._waiting.append(RequestBatch(requests.deadlines, recipient=self, slots=again, gone=1))
                self._count += len(again)
            self._flush_soon()

    def give_up(self, batch: RequestBatch, error: CacheError) -> None:
        """Answer all that is left of a batch with an error."""
        self._forget(batch)
        self._landed(batch)
        batch.fail(Failed.of(error))
        self._flush_soon()

    def refuse(self, error: CacheError) -> None:
        """Answer all that waits with an error."""
        waiting, self._waiting = self._waiting, deque()
        self._count = 0
        for batch in waiting:
            batch.fail(Failed.of(error))

    def report(self, message: Message, reason: str) -> None:
        """Publish that a message without a caller has failed."""
        self._requests.emitter.publish(DeadLetter(address=self._address, wire_name=message.WIRE_NAME, reason=reason))

    def _landed(self, batch: RequestBatch) -> None:
        """A batch has its first answer, or counts as lost: others may leave."""
        if not batch.answered:
            batch.answered = self._moved = True
            self._in_flight -= 1
            self._unanswered -= len(batch.slots)

    def _forget(self, batch: RequestBatch) -> None:
        self._requests.in_flight.pop(batch.token, None)
        batch.unwatch()


def _no_reply(answer: Any) -> CacheError:
    return answer if isinstance(answer, BadMessage) else BadMessage("the answer is not a reply")


def _size(message: Any) -> int:
    """Bytes of the value that a message carries; 0 if it carries none, or an object."""
    value = getattr(message, "value", None)
    return len(value) if type(value) is bytes else 0


_ANSWERED = ReplySlot(SlotBatch(None), Get(""), reply=Missing())
"""In a batch, in the place of a slot that was answered."""
