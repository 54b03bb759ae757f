"""Requester of a bus over NATS: sends requests for one address in batches and receives the replies.

A request waits in a slot of a `RequestBatch`, which is sent in the next iteration of the event loop. While `window`
messages are unanswered, requests wait for a reply to one of them. After 10 ms without any reply they are sent anyway,
because the worker may be dead and others may serve the address too. A caller on the event loop of the bus adds its
request to the batch directly and awaits the slot. Requests from other threads are posted.

    token                 identifies a message in flight, a `RequestBatch`; replies arrive at `<inbox>.<token>`
    Cachebus-Budget       remaining seconds: one number, or one per request of an array if they differ
    Cachebus-Sent         sender, and time on its clock, so that the receiver can estimate the age of the message
    traceparent           W3C trace context of the request, or of all requests of an array
    Cachebus-Traceparents trace contexts of an array if they differ, one per request or empty
    Cachebus-Partial      an array may be answered in several messages
    Cachebus-Index        in a reply: indexes of the requests that it answers; all requests if omitted

An idempotent request without a reply after `resend_after` seconds is resent once. Other requests are never resent.
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

HEADROOM = 4096  # Bytes of a NATS message that are reserved for headers.
_FEW = 16  # Number of requests up to which a batch is not split into two messages.
_NEVER = float("inf")
_NONE: dict[str, str] = {}
_HOLD = 0.01  # Seconds without any reply after which waiting requests are sent anyway.


class RequestBatch(SlotBatch, eq=False, kw_only=True):
    """Requests of one NATS message, waiting or in flight. `end` and `resend_at` are on the clock of the event loop."""

    recipient: RemoteRecipient
    token: str = ""
    unanswered: int = 0
    end: float = _NEVER
    resend_at: float = _NEVER
    answered: bool = False  # At least in part, or considered lost.

    def answer(self, reply: Any) -> None:
        """Answer the slots whose deadline has passed, and resend idempotent requests. Called by the deadline timer."""
        super().answer(reply)
        self.recipient.overdue(self)

    def drop_late(self, now: float) -> None:
        """Remove requests whose deadline has passed, and those without a caller unless they invalidate."""
        slots, self.slots = self.slots, []
        for slot in slots:
            if slot.deadline <= now:
                if slot.late is not None:
                    slot.give(slot.late())
            elif slot.waiting or getattr(slot.request, "INVALIDATES", False):
                self.slots.append(slot)


class DeadLetters(Struct, eq=False):
    """Reply port of a message without a caller. A failure is published as a `DeadLetter` event."""

    recipient: RemoteRecipient
    message: Message
    waiting: bool = True

    def answer(self, reply: Any) -> None:
        if type(reply) is Failed:
            self.recipient.report(self.message, reply.detail)


class Requests:
    """Reply inbox of one bus, and its remote recipients."""

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
        """Subscribe to the reply inbox."""
        await self.connection.listen(f"{self.inbox}*", self._take)

    def end(self, error: CacheError) -> None:
        """Answer all requests in flight or waiting with an error."""
        for batch in list(self.in_flight.values()):
            batch.recipient.give_up(batch, error)
        for recipient in self.recipients.values():
            recipient.refuse(error)

    def head(self, budgets: list[float], traces: list[str | None]) -> bytes:
        """Return the headers of a message with one or more requests."""
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
    """Recipient for an address that another process serves."""

    def __init__(self, address: str, subject: str, requests: Requests) -> None:
        self._address = address
        self._subject = subject
        self._requests = requests
        self._waiting: deque[RequestBatch] = deque()  # The last batch takes new requests until it is full.
        self._count = 0  # Waiting requests.
        self._in_flight = 0  # Batches without any reply so far.
        self._unanswered = 0  # Requests in these batches.
        self._bytes_each = 0.0  # Mean request size in the last batch, to choose the size of the next.
        self._scheduled = 0  # Scheduled calls of `_flush`.
        self._held = False
        self._moved = False  # A reply has arrived since the hold began.

    def __repr__(self) -> str:
        return f"<RemoteRecipient {self._address}, {self._count} waiting, {self._in_flight} messages in flight>"

    # For the bus

    def turn(self, kind: type[Message]) -> Turn:
        return self.take_turn

    def take_turn(self, message: Any) -> ReplySlot | Failed | None:
        """Add a message to the waiting batch and return its slot, or `None` on another thread, which must `post`."""
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
            elif not self._scheduled:  # Inlined from `_flush_soon`, to save a call per lone request.
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
        slot.batch.gone += 1  # A port does not report that its caller has gone.
        if envelope.deadline is not None:
            slot.deadline = envelope.deadline - requests.now() + requests.deadlines.now()

    def obstacle_to_blocking(self) -> str | None:
        obstacle = "it would stop the event loop of this thread; await an asynchronous cache, or use another thread"
        return None if running_loop() is None else obstacle

    # Sending

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
        # Each scheduled flush may send one message, for the callers that a reply has just woken.
        window = max(1, self._requests.options.window - self._scheduled)
        while self._waiting and self._in_flight < window:
            self._send(window)
        if self._waiting:
            self._hold()

    def _send(self, window: int) -> None:
        """Send the oldest waiting requests as one message.

        The message gets at most its share of all pending requests, so that the worker processes one message while this
        process prepares the next.
        """
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
        """Move all but the first `most` requests of a batch back to the front of the queue."""
        rest = RequestBatch(self._requests.deadlines, recipient=self, slots=batch.slots[most:], gone=batch.gone)
        del batch.slots[most:]
        for slot in rest.slots:
            rest.size += _size(slot.request)
            if slot.batch is batch:  # False for a request that is being resent.
                slot.batch = rest
        rest.watch(batch.due)
        self._waiting.appendleft(rest)
        self._count += len(rest.slots)

    def _encoded(self, batch: RequestBatch) -> bytes | None:
        """Return the body for a batch, shortened to what can be sent; `None` if no request can be sent."""
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
                error = CacheCapacityError("the request exceeds the maximum message size of the bus", len(body), most)
                batch.slots.pop().give(Failed.of(error))
            else:
                self._put_back(batch, min(count - 1, max(1, int(limit / self._bytes_each))))
        return None

    def _refuse_unfit(self, batch: RequestBatch) -> None:
        """Fail the requests of a batch that cannot be encoded, and keep the others."""
        slots, batch.slots = batch.slots, []
        for slot in slots:
            try:
                encode(slot.request)
                batch.slots.append(slot)
            except CacheSerializationError as error:
                slot.give(Failed.of(error))

    # Receiving

    def take(self, batch: RequestBatch, delivery: Delivery) -> None:
        """Handle a reply message for a batch."""
        headers = delivery.headers if delivery.head else _NONE
        self._landed(batch)
        if headers.get("Status") == "503":
            self.give_up(batch, NoSuchActor(address=self._address))
            return
        slots, counters = batch.slots, self._requests.counters
        try:
            replies, is_array = decode_each(delivery.data, headers.get(CONTENT_TYPE, MSGPACK))
            if not is_array:  # Only a failure may answer several requests at once.
                replies = replies * len(slots) if len(slots) == 1 or type(replies[0]) is Failed else []
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
                if kind is Future and not port.done():  # Inlined from `give`, to save a call per reply.
                    port.set_result(reply)
                elif slot.waiting:
                    slot.give(reply)
                else:
                    counters.late_replies += 1
        except CacheError as error:
            self.give_up(batch, error)
        except (ValueError, IndexError):
            self.give_up(batch, BadMessage("the reply does not match the requests"))
        else:
            if not batch.unanswered:  # Inlined from `_forget`, to save two calls.
                self._requests.in_flight.pop(batch.token, None)
                if batch.bucket is not None:
                    batch.bucket.pop(batch, None)
            # After the callers are woken, so that their next requests are sent together.
            self._flush_soon()

    def overdue(self, batch: RequestBatch) -> None:
        """Resend idempotent requests after `resend_after` seconds, and drop a batch whose deadlines have passed."""
        requests = self._requests
        if requests.in_flight.get(batch.token) is not batch:
            return
        now = requests.deadlines.now()
        if batch.due < _NEVER:  # A caller began to wait after its request was sent.
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
                # Callers that stop waiting report it to their original batch, so assume that some have.
                self._waiting.append(RequestBatch(requests.deadlines, recipient=self, slots=again, gone=1))
                self._count += len(again)
            self._flush_soon()

    def give_up(self, batch: RequestBatch, error: CacheError) -> None:
        """Answer the pending requests of a batch with an error."""
        self._forget(batch)
        self._landed(batch)
        batch.fail(Failed.of(error))
        self._flush_soon()

    def refuse(self, error: CacheError) -> None:
        """Answer all waiting requests with an error."""
        waiting, self._waiting = self._waiting, deque()
        self._count = 0
        for batch in waiting:
            batch.fail(Failed.of(error))

    def report(self, message: Message, reason: str) -> None:
        """Publish a `DeadLetter` for a message without a caller that failed."""
        self._requests.emitter.publish(DeadLetter(address=self._address, wire_name=message.WIRE_NAME, reason=reason))

    def _landed(self, batch: RequestBatch) -> None:
        """Record that a batch has its first reply or counts as lost, so that another batch may be sent."""
        if not batch.answered:
            batch.answered = self._moved = True
            self._in_flight -= 1
            self._unanswered -= len(batch.slots)

    def _forget(self, batch: RequestBatch) -> None:
        self._requests.in_flight.pop(batch.token, None)
        batch.unwatch()


def _no_reply(answer: Any) -> CacheError:
    return answer if isinstance(answer, BadMessage) else BadMessage("the reply is of an unexpected message kind")


def _size(message: Any) -> int:
    """Return the size of the value of a message, in bytes; 0 if it has none, or if the value is an object."""
    value = getattr(message, "value", None)
    return len(value) if type(value) is bytes else 0


_ANSWERED = ReplySlot(SlotBatch(None), Get(""), reply=Missing())
"""Placeholder in a batch for a slot that was answered."""
