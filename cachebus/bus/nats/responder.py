"""Responder of a bus over NATS: decodes messages, passes them to the recipient, and answers each exactly once.

A message that cannot be decoded is counted, and answered with `BadMessage` if it has a reply subject. The replies to an
array are sent together and in order, or as they become available if the sender sets `Cachebus-Partial`.

A reply subject must start with an inbox prefix; otherwise the message is dropped. With any other subject, the sender
could make this process publish messages of its choice, such as a request to JetStream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from threading import get_ident
from typing import Any

from msgspec import Struct

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

from ..api import Envelope, Recipient, Turn
from ..clock import Bucket, Clock, deadlines_here
from ..codec.messages import JSON, MSGPACK, decode_each, encode
from ..events.emitter import Emitter
from ..reply_slots import PENDING
from ..tracing import turn_trace
from .compat import Delivery, header_block
from .connection import NatsConnection
from .headers import (
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
from .requester import HEADROOM

_ERROR_LENGTH = 200  # Maximum characters of an error message in a header. The body has the whole message.


class Responder:
    """Receiving end of one address for other processes."""

    def __init__(
        self, address: str, recipient: Recipient, connection: NatsConnection, clock: Clock, emitter: Emitter
    ) -> None:
        self.address = address
        self.recipient = recipient
        self.connection = connection
        self.now = clock.monotonic
        self.emitter = emitter
        self.counters = connection.counters
        self.deadlines = deadlines_here()
        self.open: set[IncomingBatch] = set()
        self.requests = 0
        self.errors = 0
        self.last_error = ""
        self.busy = 0.0  # Seconds from arrival to reply, summed over all requests.
        self.idle = asyncio.Event()
        self._inboxes = connection.options.inboxes
        self._turns: dict[type[Any], Turn] = {}

    def take(self, delivery: Delivery) -> None:
        """Handle one NATS message."""
        if delivery.reply and not delivery.reply.startswith(self._inboxes):
            self.counters.replies_refused += 1
            return
        headers = delivery.headers
        content_type = headers.get(CONTENT_TYPE, MSGPACK)
        batch = IncomingBatch(self, delivery.reply, content_type, headers.get(REQUEST_ID), PARTIAL in headers)
        options = self.connection.options
        try:
            messages, batch.is_array = decode_each(delivery.data, content_type)
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
        self.counters.requests_served += count
        self.requests += count
        now = batch.began = self.now()
        age = self.connection.ages.age(self.connection.now(), self.connection.proven, *read_sent(headers))
        traces = read_traces(headers, count)
        one_trace, one_budget = len(traces) == 1, len(budgets) == 1
        trace, left = traces[0], budgets[0] - age
        turns = self._turns
        # Always set, because the task inherited the trace context of the code that opened the bus.
        token = turn_trace.set(trace)
        try:
            message: Any
            for place, message in enumerate(messages):
                if not one_budget:
                    left = budgets[place] - age
                if not one_trace:
                    trace = traces[place]
                    turn_trace.set(trace)
                turn = turns.get(message.__class__)
                reply = self._reply(message, left) if turn is None or left <= 0.0 else turn(message)
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
        # The age is not subtracted: if it were overestimated, this timeout would come before that of the caller.
        batch.watch_rest(max(budgets))

    def _reply(self, message: Message | BadMessage, left: float) -> Any:
        """Run the turn for the first request of a kind, or refuse the message. Return `None` if it must be posted."""
        kind: type[Any] = type(message)
        turn = self._turns.get(kind)
        if turn is None:
            if not isinstance(message, Request):
                self.counters.bad_messages += 1
                error = (
                    message if isinstance(message, BadMessage) else BadMessage(f"{message.WIRE_NAME} is not a request")
                )
                return Failed.of(error)
            turn = self._turns[kind] = self.recipient.turn(kind)
        if left <= 0.0:
            self.counters.requests_expired += 1
            return Failed.of(CacheTimeoutError("the call had no time left", self.address, 0.0))
        return turn(message)

    async def drained(self) -> None:
        """Wait until all received requests are answered, at the latest at their deadlines."""
        while self.open:
            self.idle.clear()
            await self.idle.wait()

    def failed(self, code: str) -> None:
        """Record a request that was answered with an error."""
        self.errors += 1
        self.last_error = code


class ReplySlot(Struct, eq=False):
    """Reply port of one request received over NATS."""

    batch: IncomingBatch
    place: int

    @property
    def waiting(self) -> bool:
        return not self.batch.over and self.batch.replies[self.place] is None

    def answer(self, reply: Any) -> None:
        batch = self.batch
        responder = batch.responder
        if get_ident() == responder.deadlines.thread:
            batch.settle(self.place, reply)
            return
        try:
            responder.deadlines.loop.call_soon_threadsafe(batch.settle, self.place, reply)
        except RuntimeError:  # The event loop is closed, and so is the connection.
            responder.counters.lost_replies += 1


class IncomingBatch(Struct, eq=False):
    """Requests of one NATS message, and the replies so far."""

    responder: Responder
    reply_to: str
    content_type: str
    request_id: str | None
    partial: bool
    is_array: bool = False
    messages: Sequence[Message | BadMessage] = ()
    replies: list[Reply | None] = []
    ready: list[int] = []  # Indexes of replies that are not sent yet.
    unanswered: int = 0
    began: float = 0.0
    handed_over: bool = False
    over: bool = False
    scheduled: bool = False
    bucket: Bucket | None = None

    def settle(self, place: int, reply: Reply) -> None:
        """Store the reply to one request. Only the first reply counts."""
        if self.over or self.replies[place] is not None:
            return
        self.replies[place] = reply
        if type(reply) is Failed:
            self.responder.failed(reply.code)
        self.ready.append(place)
        if not self.handed_over:
            return
        self.unanswered -= 1
        if not self.unanswered and not self.is_array:
            self._send()
        elif (not self.unanswered or self.partial) and not self.scheduled:
            # Replies of the same iteration of the event loop are sent together.
            self.scheduled = True
            self.responder.deadlines.loop.call_soon(self._send)

    def watch_rest(self, budget: float) -> None:
        """Send the available replies after all requests were handed over, and wait for the others."""
        self.handed_over = True
        self.unanswered -= len(self.ready)
        if self.unanswered:
            responder = self.responder
            responder.open.add(self)
            self.bucket = responder.deadlines.watch(self, max(budget, 0.0))
        if not self.unanswered or (self.partial and self.ready):
            self._send()

    def answer(self, reply: Any) -> None:
        """Answer the pending requests with a timeout. Called at the deadline, which ignores `reply`."""
        self.bucket = None
        if self.unanswered:
            late = Failed.of(CacheTimeoutError("no answer", self.responder.address, 0.0))
            for place, given in enumerate(self.replies):
                if given is None:
                    self.settle(place, late)

    def refuse(self, error: CacheError) -> None:
        """Answer the whole message with an error."""
        if self.content_type.partition(";")[0].strip().lower() not in {MSGPACK, JSON}:
            self.content_type = MSGPACK
        failed = Failed.of(error)
        self._publish(encode(failed, self.content_type), failed)

    def _send(self) -> None:
        self.scheduled = False
        places, self.ready = self.ready, []
        if not places:
            return
        responder = self.responder
        responder.busy += (responder.now() - self.began) * len(places)
        if not self.unanswered:
            self.over = True
            if self.bucket is not None:
                self.bucket.pop(self, None)
            if self in responder.open:
                responder.open.discard(self)
                if not responder.open:
                    responder.idle.set()
        if not self.reply_to:
            self._dead(places)
        elif not self.is_array:
            reply, body = self._encoded(self.replies[0])
            self._publish(body, reply if type(reply) is Failed else None)
        else:
            self._send_array(places if self.partial else list(range(len(self.replies))))

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
        """Answer an array if a reply cannot be encoded, or if the replies are too large for one message."""
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
            self.refuse(CacheCapacityError("the replies exceed the maximum message size of the bus", sizes, limit))
            return
        for first, end in parts:
            self._publish(encode(replies[first:end], self.content_type), None, places[first:end])

    def _encoded(self, reply: Any) -> tuple[Any, bytes]:
        """Return a reply that can be sent, and its bytes: the given reply, or the error that prevents sending it."""
        limit = self.responder.connection.max_payload - HEADROOM
        try:
            body = encode(reply, self.content_type)
            if len(body) <= limit:
                return reply, body
            failed = Failed.of(
                CacheCapacityError("the reply exceeds the maximum message size of the bus", len(body), limit)
            )
        except CacheError as error:
            failed = Failed.of(error)
        return failed, encode(failed, self.content_type)

    def _publish(self, body: bytes, failed: Failed | None, places: list[int] | None = None) -> None:
        if not self.reply_to:
            return
        headers: dict[str, str] = {}
        if places is not None and places != list(range(len(self.replies))):
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
                responder.emitter.publish(
                    DeadLetter(address=responder.address, wire_name=wire_name, reason=reply.detail)
                )
