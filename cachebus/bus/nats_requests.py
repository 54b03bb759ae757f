"""The asking side of a bus over NATS: requests to one address travel together, and come back as they are answered.

A request leaves at once if nothing to its address is in flight. Otherwise it leaves with what else comes up by the next
step of the loop. While `window` messages are unanswered it waits for one of their answers, or for 10 ms: the worker that
took them may be dead, and others may serve the address too.

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
from collections import deque
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
    Message,
    NoSuchActor,
    Overloaded,
    Reply,
)

from .api import Envelope, Turn
from .clock import TICK, Bucket, Clock, Deadlines, deadlines_here
from .codec import MSGPACK, decode_each, encode
from .compat import running_loop
from .emitter import Emitter
from .nats_compat import Delivery
from .nats_connection import NatsConnection, age_clock
from .nats_headers import BUDGET, CONTENT_TYPE, INDEX, PARTIAL, SENT, write_budgets, write_traces

HEADROOM = 4096  # Bytes of a NATS message that are left to headers.
_FEW = 16  # Requests that are not worth two messages.
_NONE: dict[str, str] = {}
_HOLD = 0.01  # Seconds that requests wait for an answer to others, at most.


class RequestBatch(Struct, eq=False):
    """The requests of one NATS message. A slot holds one that is not answered yet."""

    recipient: RemoteRecipient
    token: str
    slots: list[Envelope | None]
    unanswered: int
    end: float
    answered: bool = False  # At least in part, or given up as lost.
    bucket: Bucket | None = None

    def answer(self, reply: Any) -> None:
        """Called by the deadlines: it is time to send again what may be sent again, or to give up."""
        self.recipient.overdue(self)


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
        self._waiting: deque[Envelope] = deque()
        self._in_flight = 0  # Batches without any answer so far,
        self._unanswered = 0  # and the requests that are in them.
        self._bytes_each = 0.0  # Of the requests of the last batch, so that the next one has the right size at once.
        self._scheduled = False
        self._held = False

    def __repr__(self) -> str:
        return f"<RemoteRecipient {self._address}, {len(self._waiting)} waiting, {self._in_flight} messages in flight>"

    # For the bus

    def turn(self, kind: type[Message]) -> Turn:
        return _never_here

    def post(self, envelope: Envelope) -> None:
        requests, waiting = self._requests, self._waiting
        if get_ident() != requests.thread:
            try:
                requests.loop.call_soon_threadsafe(self.post, envelope)
            except RuntimeError:  # The loop is closed.
                self._fail(envelope, CacheClosed("the bus is closed"))
            return
        if len(waiting) >= requests.options.max_waiting and not getattr(envelope.message, "INVALIDATES", False):
            self._fail(envelope, Overloaded(address=self._address, capacity=requests.options.max_waiting))
            return
        if not self._in_flight and not waiting and not self._scheduled:
            envelope.attempts += 1
            now = requests.now()
            deadline = envelope.deadline
            # A message that nobody waits for has as much time as a request from elsewhere.
            self._dispatch([envelope], [requests.options.budget if deadline is None else deadline - now], now)
            return
        waiting.append(envelope)
        if self._scheduled:
            return
        if not self._in_flight:
            self._flush()
        elif self._in_flight < requests.options.window:
            self._flush_soon()
        else:
            self._hold()

    def obstacle_to_blocking(self) -> str | None:
        obstacle = "it would stop the event loop of this thread; await an asynchronous cache, or use another thread"
        return None if running_loop() is None else obstacle

    # Out

    def _flush_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._requests.loop.call_soon(self._flush)

    def _hold(self) -> None:
        if not self._held:
            self._held = True
            self._requests.loop.call_later(_HOLD, self._end_hold)

    def _end_hold(self) -> None:
        self._held = False
        if self._waiting:
            self._send()
        if self._waiting:
            self._hold()

    def _flush(self) -> None:
        self._scheduled = False
        while self._waiting and self._in_flight < self._requests.options.window:
            self._send()
        if self._waiting:
            self._hold()

    def _send(self) -> None:
        """Send a message of what waits."""
        now = self._requests.now()
        envelopes, budgets = self._collect(now)
        if envelopes:
            self._dispatch(envelopes, budgets, now)

    def _dispatch(self, envelopes: list[Envelope], budgets: list[float], now: float) -> None:
        """Send a message of these requests, or of as many of them as can travel."""
        requests = self._requests
        try:
            if requests.closed:
                raise CacheClosed("the bus is closed")
            body = self._encoded(envelopes, budgets)
            if body is None:
                return
            token, end = f"{next(requests.tokens):x}", now + max(budgets)
            batch = RequestBatch(self, token, [*envelopes], len(envelopes), end)
            requests.connection.write(self._subject, body, requests.inbox + batch.token, self._head(envelopes, budgets))
        except CacheError as error:
            for envelope in envelopes:
                self._fail(envelope, error)
            return
        requests.in_flight[batch.token] = batch
        self._in_flight += 1
        self._unanswered += len(envelopes)
        counters = requests.counters
        counters.messages_sent += 1
        counters.requests_sent += len(envelopes)
        batch.bucket = requests.deadlines.watch(batch, min(batch.end - now, requests.options.resend_after), _nothing)

    def _collect(self, now: float) -> tuple[list[Envelope], list[float]]:
        """Take from what waits the requests of the next message, and the seconds that each has left."""
        requests, waiting = self._requests, self._waiting
        options = requests.options
        # No more than its share of all there are: while one message is worked on there, we work on the other here.
        share = -(-(len(waiting) + self._unanswered) // options.window)
        limit = min(options.batch_bytes, requests.connection.max_payload - HEADROOM)
        most = min(options.batch, max(_FEW, share))
        if self._bytes_each * most > limit:
            most = max(1, int(limit / self._bytes_each))
        envelopes: list[Envelope] = []
        budgets: list[float] = []
        size = 0
        while waiting and len(envelopes) < most:
            envelope = waiting[0]
            message, port = envelope.message, envelope.port
            value: Any = getattr(message, "value", None)
            if type(value) is bytes:
                size += len(value)
                if size > limit and envelopes:
                    break
            waiting.popleft()
            left = options.budget if envelope.deadline is None else envelope.deadline - now
            gone = port is not None and not port.waiting
            if left <= 0.0 or (gone and not getattr(message, "INVALIDATES", False)):
                continue  # The caller's own deadline answers it.
            envelope.attempts += 1
            envelopes.append(envelope)
            budgets.append(left)
        return envelopes, budgets

    def _encoded(self, envelopes: list[Envelope], budgets: list[float]) -> bytes | None:
        """The body for a batch, which is shortened to what can travel; `None` if nothing of it can."""
        options = self._requests.options
        most = self._requests.connection.max_payload - HEADROOM
        limit = min(options.batch_bytes, most)
        while envelopes:
            count = len(envelopes)
            try:
                body = encode(envelopes[0].message if count == 1 else [each.message for each in envelopes])
            except CacheSerializationError:
                self._refuse_unfit(envelopes, budgets)
                continue
            self._bytes_each = len(body) / count
            if len(body) <= limit or (count == 1 and len(body) <= most):
                return body
            if count == 1:
                self._fail(envelopes.pop(), CacheCapacityError("the request is too large for the bus", len(body), most))
                break
            fitting = min(count - 1, max(1, int(limit / self._bytes_each)))
            for envelope in envelopes[fitting:]:
                envelope.attempts -= 1
            self._waiting.extendleft(reversed(envelopes[fitting:]))
            del envelopes[fitting:], budgets[fitting:]
        return None

    def _refuse_unfit(self, envelopes: list[Envelope], budgets: list[float]) -> None:
        """Fail each request of a batch that cannot be encoded. The others stay."""
        for place in reversed(range(len(envelopes))):
            try:
                encode(envelopes[place].message)
            except CacheSerializationError as error:
                del budgets[place]
                self._fail(envelopes.pop(place), error)

    def _head(self, envelopes: list[Envelope], budgets: list[float]) -> bytes:
        requests = self._requests
        sent = f"{SENT}: {requests.name} {requests.age_now():.6f}\r\n"
        if len(envelopes) == 1:
            trace = envelopes[0].trace
            traced = "" if trace is None else write_traces([trace])
            return f"NATS/1.0\r\n{BUDGET}: {budgets[0]:.3f}\r\n{sent}{traced}\r\n".encode()
        traced = write_traces([each.trace for each in envelopes])
        return f"NATS/1.0\r\n{BUDGET}: {write_budgets(budgets)}\r\n{sent}{PARTIAL}: 1\r\n{traced}\r\n".encode()

    # Back

    def take(self, batch: RequestBatch, delivery: Delivery) -> None:
        """Take an answer to a batch."""
        headers = delivery.headers if delivery.head else _NONE
        self._landed(batch)
        if headers.get("Status") == "503":
            self.give_up(batch, NoSuchActor(address=self._address))
            return
        slots = batch.slots
        try:
            replies, is_array = decode_each(delivery.data, headers.get(CONTENT_TYPE, MSGPACK))
            if not is_array:
                replies = replies * len(slots)
            index = headers.get(INDEX) if is_array else None
            places = range(len(slots)) if index is None else map(int, index.split(","))
            answered = 0
            for place, reply in zip(places, replies, strict=True):
                envelope = slots[place]
                if envelope is None:
                    continue
                slots[place] = None
                answered += 1
                port = envelope.port
                if port is None or not isinstance(reply, Reply):
                    self._give(envelope, reply)
                elif port.waiting:
                    port.answer(reply)
                else:
                    self._requests.counters.late_replies += 1
            batch.unanswered -= answered
        except CacheError as error:
            self.give_up(batch, error)
        except (ValueError, IndexError):
            self.give_up(batch, BadMessage("the answer does not fit the requests"))
        else:
            if not batch.unanswered:  # As `_forget` does, less a call for each lone request.
                self._requests.in_flight.pop(batch.token, None)
                if batch.bucket is not None:
                    batch.bucket.pop(batch, None)
            # After the callers were woken, so that what they ask next leaves together. One alone shall not wait.
            if self._waiting or answered > 1:
                self._flush_soon()

    def overdue(self, batch: RequestBatch) -> None:
        """Send again what may be sent again; give up what has no time left."""
        requests = self._requests
        batch.bucket = None
        if requests.in_flight.get(batch.token) is not batch:
            return
        self._landed(batch)
        now = requests.now()
        if now >= batch.end - TICK:
            self._forget(batch)
            self._flush()
            return
        for envelope in batch.slots:
            if envelope is not None and envelope.attempts == 1 and getattr(envelope.message, "IDEMPOTENT", False):
                requests.counters.requests_resent += 1
                self._waiting.append(envelope)
        batch.bucket = requests.deadlines.watch(batch, batch.end - now, _nothing)
        if self._waiting:
            self._flush()

    def give_up(self, batch: RequestBatch, error: CacheError) -> None:
        """Answer all that is left of a batch with an error."""
        self._forget(batch)
        self._landed(batch)
        for envelope in batch.slots:
            if envelope is not None:
                self._fail(envelope, error)
        batch.slots = []

    def refuse(self, error: CacheError) -> None:
        """Answer all that waits with an error."""
        while self._waiting:
            self._fail(self._waiting.popleft(), error)

    def _landed(self, batch: RequestBatch) -> None:
        """A batch has its first answer, or counts as lost: others may leave."""
        if not batch.answered:
            batch.answered = True
            self._in_flight -= 1
            self._unanswered -= len(batch.slots)

    def _forget(self, batch: RequestBatch) -> None:
        self._requests.in_flight.pop(batch.token, None)
        if batch.bucket is not None:
            batch.bucket.pop(batch, None)

    def _give(self, envelope: Envelope, reply: Message | BadMessage) -> None:
        """Deal with an answer that is no reply, or that nobody waits for."""
        if not isinstance(reply, Reply):
            self._fail(envelope, reply if isinstance(reply, BadMessage) else BadMessage("the answer is not a reply"))
        elif isinstance(reply, Failed):
            self._dead(envelope.message, reply.detail)

    def _fail(self, envelope: Envelope, error: CacheError) -> None:
        if envelope.port is not None:
            envelope.port.answer(Failed.of(error))
        else:
            self._dead(envelope.message, str(error))

    def _dead(self, message: Message, reason: str) -> None:
        self._requests.emitter.emit(DeadLetter(address=self._address, wire_name=message.WIRE_NAME, reason=reason))


def _never_here(message: Message) -> None:
    """The turn of an actor that is elsewhere: none can be taken, so the message is posted."""


def _nothing() -> None:
    pass
