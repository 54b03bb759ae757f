"""The answering side of a bus over NATS: what comes in is decoded, handed to the recipient, and answered once.

Whatever the bytes are, they end no subscription: what cannot be read is answered `BadMessage` if an answer is wanted, and
counted. The answers to an array go back together, in its order. To a sender that says `Cachebus-Partial` they go back as
they come, so that one that takes long holds up no other.

A message is answered below an inbox prefix only. With another subject it would be the sender who chooses what this process
publishes where, such as a request to JetStream; it is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from threading import get_ident
from typing import Any

from cachebus.messages import (
    BadMessage,
    CacheCapacityError,
    CacheError,
    CacheSerializationError,
    CacheTimeoutError,
    DeadLetter,
    Failed,
    Message,
    Reply,
    Request,
)

from .api import Envelope, Recipient, Turn
from .clock import Clock
from .codec import JSON, MSGPACK, decode_each, encode
from .deadlines import Bucket, Deadlines, deadlines_here
from .emitter import Emitter
from .message_age import MessageAges, age_clock
from .nats_compat import Delivery, header_block
from .nats_connection import NatsConnection
from .nats_headers import (
    CONTENT_TYPE,
    ERROR,
    ERROR_CODE,
    INDEX,
    PARTIAL,
    REQUEST_ID,
    read_budgets,
    read_sent,
    read_traces,
)
from .nats_options import NatsCounters
from .nats_requests import HEADROOM
from .slots import PENDING
from .tracing import turn_trace

_ERROR_LENGTH = 200  # Characters of a sentence in a header; the whole of it is in the body.


class Responder:
    """One address as other processes reach it."""

    def __init__(
        self,
        address: str,
        recipient: Recipient,
        connection: NatsConnection,
        clock: Clock,
        emitter: Emitter,
        counters: NatsCounters,
        ages: MessageAges,
    ) -> None:
        self.address = address
        self.recipient = recipient
        self.connection = connection
        self.now = clock.monotonic
        self.emitter = emitter
        self.counters = counters
        self.loop = asyncio.get_running_loop()
        self.thread = get_ident()
        self.deadlines: Deadlines = deadlines_here()
        self.open: set[IncomingBatch] = set()
        self.requests = 0
        self.errors = 0
        self.last_error = ""
        self.busy = 0.0  # Seconds from the arrival of each request to its answer, all together.
        self._ages = ages
        self._age_now = age_clock(clock)
        self._inboxes = connection.options.inboxes
        self._turns: dict[type[Any], Turn] = {}
        self._idle: asyncio.Event = asyncio.Event()

    def take(self, delivery: Delivery) -> None:
        """Serve one NATS message."""
        if delivery.reply and not delivery.reply.startswith(self._inboxes):
            self.counters.replies_refused += 1
            return
        headers = delivery.headers
        batch = IncomingBatch(self, delivery.reply, headers)
        options = self.connection.options
        try:
            messages, batch.is_array = decode_each(delivery.data, batch.content_type)
            count = len(messages)
            budgets = read_budgets(headers, count, options.budget, options.max_budget)
        except CacheError as error:
            self.counters.bad_messages += 1
            self.failed(error.code)
            batch.refuse(error)
            return
        batch.messages = messages
        replies: list[Reply | None] = [None] * count
        batch.replies = replies
        batch.unanswered = count
        batch.whole = list(range(count))
        self.counters.requests_served += count
        self.requests += count
        now = batch.began = self.now()
        age = self._ages.age(self._age_now(), self.connection.proven, *read_sent(headers))
        traces = read_traces(headers, count)
        one_trace, one_budget = len(traces) == 1, len(budgets) == 1
        trace, left = traces[0], budgets[0] - age
        # Set in any case: what this task inherited is the trace of the code that opened the bus.
        token = turn_trace.set(trace)
        try:
            message: Any
            for place, message in enumerate(messages):
                if not one_budget:
                    left = budgets[place] - age
                if not one_trace:
                    trace = traces[place]
                    turn_trace.set(trace)
                reply = self._reply(message, left)
                if reply is None:
                    self.recipient.post(Envelope(message, ReplySlot(batch, place), now + left, trace))
                elif isinstance(reply, PENDING):
                    reply.attach(ReplySlot(batch, place))
                elif replies[place] is None:
                    replies[place] = reply
                    batch.ready.append(place)
                    if type(reply) is Failed:
                        self.failed(reply.code)
        finally:
            turn_trace.reset(token)
        # Without the age, or an estimate that is too high would have the caller hear of its own deadline from here.
        batch.handed_over(max(budgets))

    def _reply(self, message: Message | BadMessage, left: float) -> Any:
        """Take the recipient's turn for one request; `None` if it must be posted."""
        kind: type[Any] = type(message)
        turn = self._turns.get(kind)
        if turn is None:
            if not isinstance(message, Request):
                self.counters.bad_messages += 1
                error = message if isinstance(message, BadMessage) else BadMessage(f"{message.WIRE_NAME} is no request")
                return Failed.of(error)
            turn = self._turns[kind] = self.recipient.turn(kind)
        if left <= 0.0:
            self.counters.requests_expired += 1
            return Failed.of(CacheTimeoutError("the call had no time left", self.address, 0.0))
        return turn(message)

    async def drained(self) -> None:
        """Return when everything that was taken in is answered. What takes longer than its budget is answered too."""
        while self.open:
            self._idle.clear()
            await self._idle.wait()

    def failed(self, code: str) -> None:
        """Count a request that was answered with an error."""
        self.errors += 1
        self.last_error = code

    def done(self, batch: IncomingBatch) -> None:
        """Forget a message that is answered in full."""
        self.open.discard(batch)
        if not self.open:
            self._idle.set()


class ReplySlot:
    """The port of one request that came over NATS."""

    __slots__ = ("_batch", "_place")

    def __init__(self, batch: IncomingBatch, place: int) -> None:
        self._batch = batch
        self._place = place

    @property
    def waiting(self) -> bool:
        return not self._batch.over and self._batch.replies[self._place] is None

    def answer(self, reply: Any) -> None:
        batch = self._batch
        responder = batch.responder
        if get_ident() == responder.thread:
            batch.settle(self._place, reply)
            return
        try:
            responder.loop.call_soon_threadsafe(batch.settle, self._place, reply)
        except RuntimeError:  # The loop is closed, and the connection with it.
            responder.counters.lost_replies += 1


class IncomingBatch:
    """One NATS message of requests, and the replies to it so far."""

    __slots__ = (
        "_bucket",
        "_handed_over",
        "_handed_to_others",
        "_scheduled",
        "began",
        "content_type",
        "is_array",
        "messages",
        "over",
        "partial",
        "ready",
        "replies",
        "reply_to",
        "request_id",
        "responder",
        "unanswered",
        "whole",
    )

    def __init__(self, responder: Responder, reply_to: str, headers: dict[str, str]) -> None:
        self.responder = responder
        self.reply_to = reply_to
        self.content_type = headers.get(CONTENT_TYPE, MSGPACK)
        self.request_id = headers.get(REQUEST_ID)
        self.partial = PARTIAL in headers
        self.is_array = False
        self.messages: Sequence[Message | BadMessage] = ()
        self.replies: list[Reply | None] = []
        self.unanswered = 0
        self.whole: list[int] = []  # Every place.
        self.over = False
        self.began = 0.0
        self._bucket: Bucket | None = None
        self.ready: list[int] = []  # Places that are answered and not sent.
        self._handed_over = False
        self._handed_to_others = False  # At least one request is not answered at once.
        self._scheduled = False

    def settle(self, place: int, reply: Reply) -> None:
        """Take the reply to one request. Only the first counts."""
        if self.over or self.replies[place] is not None:
            return
        self.replies[place] = reply
        if type(reply) is Failed:
            self.responder.failed(reply.code)
        self.ready.append(place)
        if not self._handed_over:
            return
        self.unanswered -= 1
        if not self.unanswered and not self.is_array:
            self._send()
        elif (not self.unanswered or self.partial) and not self._scheduled:
            # What is answered within the same step of the loop goes back together.
            self._scheduled = True
            self.responder.loop.call_soon(self._send)

    def handed_over(self, budget: float) -> None:
        """Every request has been handed over: send what is answered, and watch over the rest."""
        self._handed_over = True
        self.unanswered -= len(self.ready)
        if self.unanswered:
            responder = self.responder
            responder.open.add(self)
            self._handed_to_others = True
            self._bucket = responder.deadlines.watch(self, max(budget, 0.0), _nothing)
        if not self.unanswered or (self.partial and self.ready):
            self._send()

    def answer(self, reply: Any) -> None:
        """Called by the deadlines: what is not answered by now never will be."""
        self._bucket = None
        if self.unanswered:
            late = Failed.of(CacheTimeoutError("no answer", self.responder.address, 0.0))
            for place, given in enumerate(self.replies):
                if given is None:
                    self.settle(place, late)

    def refuse(self, error: CacheError) -> None:
        """Answer a message that cannot be read."""
        if self.content_type.partition(";")[0].strip().lower() not in {MSGPACK, JSON}:
            self.content_type = MSGPACK
        failed = Failed.of(error)
        self._publish(encode(failed, self.content_type), failed)

    def _send(self) -> None:
        self._scheduled = False
        places, self.ready = self.ready, []
        if not places:
            return
        responder = self.responder
        responder.busy += (responder.now() - self.began) * len(places)
        if not self.unanswered:
            self.over = True
            if self._bucket is not None:
                self._bucket.pop(self, None)
            if self._handed_to_others:
                responder.done(self)
        if not self.reply_to:
            self._dead(places)
        elif not self.is_array:
            self._send_single(self.replies[0])
        else:
            self._send_array(places if self.partial else self.whole)

    def _send_single(self, reply: Any) -> None:
        limit = self.responder.connection.max_payload - HEADROOM
        try:
            body = encode(reply, self.content_type)
        except CacheError:
            body = b""
        if not body or len(body) > limit:
            reply, body = self._encoded(reply)
        self._publish(body, reply if type(reply) is Failed else None)

    def _send_array(self, places: list[int]) -> None:
        replies: list[Any] = [self.replies[place] for place in places]
        limit = self.responder.connection.max_payload - HEADROOM
        try:
            body = encode(replies, self.content_type)
            if len(body) <= limit:
                self._publish(body, None, places)
                return
        except CacheSerializationError:
            pass
        self._send_in_parts(places, replies, limit)

    def _send_in_parts(self, places: list[int], replies: list[Any], limit: int) -> None:
        """Answer an array of which a reply cannot be encoded, or that is too large for one message."""
        first, size, sizes = 0, 0, 0
        parts: list[tuple[int, int]] = []
        for number, given in enumerate(replies):
            replies[number], body = self._encoded(given)
            sizes += len(body)
            if number > first and size + len(body) > limit:
                parts.append((first, number))
                first, size = number, 0
            size += len(body) + 1
        parts.append((first, len(replies)))
        if len(parts) > 1 and not self.partial:
            self.refuse(CacheCapacityError("the answers are too large for the bus", sizes, limit))
            return
        for first, end in parts:
            self._publish(encode(replies[first:end], self.content_type), None, places[first:end])

    def _encoded(self, reply: Any) -> tuple[Any, bytes]:
        """A reply that can be sent, and its bytes."""
        limit = self.responder.connection.max_payload - HEADROOM
        try:
            body = encode(reply, self.content_type)
            if len(body) <= limit:
                return reply, body
            failed = Failed.of(CacheCapacityError("the answer is too large for the bus", len(body), limit))
        except CacheError as error:
            failed = Failed.of(error)
        return failed, encode(failed, self.content_type)

    def _publish(self, body: bytes, failed: Failed | None, places: list[int] | None = None) -> None:
        if not self.reply_to:
            return
        headers: dict[str, str] = {}
        if places is not None and places != self.whole:
            headers[INDEX] = ",".join(map(str, places))
        if self.content_type != MSGPACK:
            headers[CONTENT_TYPE] = JSON if self.content_type.startswith(JSON) else MSGPACK
        if self.request_id is not None:
            headers[REQUEST_ID] = self.request_id
        if failed is not None:
            headers[ERROR] = failed.detail[:_ERROR_LENGTH].encode("ascii", "replace").decode()
            headers[ERROR_CODE] = failed.code
        try:
            self.responder.connection.write(self.reply_to, body, head=header_block(headers) if headers else b"")
        except CacheError:
            self.responder.counters.lost_replies += 1

    def _dead(self, places: list[int]) -> None:
        responder = self.responder
        for place in places:
            reply, message = self.replies[place], self.messages[place]
            if isinstance(reply, Failed):
                wire_name = "" if isinstance(message, BadMessage) else message.WIRE_NAME
                responder.emitter.emit(DeadLetter(address=responder.address, wire_name=wire_name, reason=reply.detail))


def _nothing() -> None:
    pass
