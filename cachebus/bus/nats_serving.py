"""Being asked over NATS: what came in is decoded, given to the recipient, and answered once.

Whatever the bytes are, they end no subscription: what cannot be read is answered `BadMessage` where an answer is wanted,
and counted. The answers to an array go back together, in its order; to whoever says `Cachebus-Partial` they go back as
they come, so that one that takes long holds up no other.
"""

from __future__ import annotations

import asyncio
from asyncio import _get_running_loop
from typing import Any, cast

from nats.aio.msg import Msg

from cachebus.messages import (
    BadMessage,
    CacheCapacityError,
    CacheError,
    CacheTimeoutError,
    DeadLetter,
    Failed,
    Message,
    Reply,
    Request,
)

from .api import Envelope, Recipient, Turn
from .clock import Clock
from .codec import JSON, MSGPACK, decode_each, encode, join
from .deadlines import Deadlines, deadlines_here
from .emitter import Emitter
from .nats_connection import NatsConnection
from .nats_headers import CONTENT_TYPE, ERROR, ERROR_CODE, INDEX, PARTIAL, REQUEST_ID, read_budgets, read_traces
from .nats_options import NatsCounters
from .nats_requests import HEADROOM
from .slots import PENDING
from .subjects import is_ours
from .tracing import turn_trace

_ERROR_LENGTH = 200  # Characters of a sentence in a header; the whole of it is in the body.


class Serving:
    """One address as others reach it."""

    def __init__(
        self,
        address: str,
        recipient: Recipient,
        connection: NatsConnection,
        clock: Clock,
        emitter: Emitter,
        counters: NatsCounters,
    ) -> None:
        self.address = address
        self.recipient = recipient
        self.connection = connection
        self.clock = clock
        self.emitter = emitter
        self.counters = counters
        self.loop = asyncio.get_running_loop()
        self.deadlines: Deadlines = deadlines_here()
        self.open: set[Asked] = set()
        self.requests = 0
        self.errors = 0
        self.last_error = ""
        self.busy = 0.0  # Seconds from the arrival of each request to its answer, all together.
        self._turns: dict[type[Message], Turn] = {}
        self._idle: asyncio.Event = asyncio.Event()

    def take(self, msg: Msg) -> None:
        """Serve one NATS message."""
        headers = msg.headers or {}
        asked = Asked(self, msg.reply if not is_ours(msg.reply) else "", headers)
        try:
            messages, asked.is_array = decode_each(msg.data, asked.content_type)
            budgets = read_budgets(headers, len(messages), self.connection.options.budget)
        except CacheError as error:
            self.counters.bad_messages += 1
            self.failed(error.code)
            asked.refuse(error)
            return
        asked.messages = messages
        asked.replies = [None] * len(messages)
        asked.left = len(messages)
        self.counters.requests_served += len(messages)
        self.requests += len(messages)
        now = asked.began = self.clock.monotonic()
        traces = read_traces(headers, len(messages))
        # Set in any case: what this task inherited is the trace of whoever opened the bus.
        token = turn_trace.set(None)
        try:
            for place, message in enumerate(messages):
                trace = traces[place] if len(traces) > 1 else traces[0]
                turn_trace.set(trace)
                self._serve(asked, place, message, now, budgets[place] if len(budgets) > 1 else budgets[0], trace)
        finally:
            turn_trace.reset(token)
        asked.taken_in(max(budgets))

    async def drained(self) -> None:
        """Return when everything that was taken in is answered. What takes longer than its budget is answered too."""
        while self.open:
            self._idle.clear()
            await self._idle.wait()

    def failed(self, code: str) -> None:
        """Count a request that was answered with an error."""
        self.errors += 1
        self.last_error = code

    def done(self, asked: Asked) -> None:
        """All of a message is answered."""
        self.open.discard(asked)
        if not self.open:
            self._idle.set()

    def _serve(
        self, asked: Asked, place: int, message: Message | BadMessage, now: float, budget: float, trace: str | None
    ) -> None:
        if isinstance(message, BadMessage):
            self.counters.bad_messages += 1
            asked.settle(place, Failed.of(message))
            return
        if not isinstance(message, Request):
            self.counters.bad_messages += 1
            asked.settle(place, Failed.of(BadMessage(f"{message.WIRE_NAME} is no request")))
            return
        if budget <= 0:
            asked.settle(place, Failed.of(CacheTimeoutError("the call had no time left", self.address, 0.0)))
            return
        request = cast("Message", message)
        kind = type(request)
        turn = self._turns.get(kind)
        if turn is None:
            turn = self._turns[kind] = self.recipient.turn(kind)
        reply = turn(request)
        if reply is None:
            self.recipient.post(Envelope(request, Slot(asked, place), now + budget, trace))
        elif isinstance(reply, PENDING):
            reply.attach(Slot(asked, place))
        else:
            asked.settle(place, reply)


class Slot:
    """The port of one request that came over NATS."""

    __slots__ = ("_asked", "_place")

    def __init__(self, asked: Asked, place: int) -> None:
        self._asked = asked
        self._place = place

    @property
    def waiting(self) -> bool:
        return not self._asked.over and self._asked.replies[self._place] is None

    def answer(self, reply: Any) -> None:
        asked = self._asked
        if _get_running_loop() is asked.serving.loop:
            asked.settle(self._place, reply)
            return
        try:
            asked.serving.loop.call_soon_threadsafe(asked.settle, self._place, reply)
        except RuntimeError:  # The loop is closed, and the connection with it.
            asked.serving.counters.lost_replies += 1


class Asked:
    """One NATS message of requests, and the answers to it so far."""

    def __init__(self, serving: Serving, reply_to: str, headers: dict[str, str]) -> None:
        self.serving = serving
        self.reply_to = reply_to
        self.content_type = headers.get(CONTENT_TYPE, MSGPACK)
        self.request_id = headers.get(REQUEST_ID)
        self.partial = PARTIAL in headers
        self.is_array = False
        self.messages: list[Message | BadMessage] = []
        self.replies: list[Reply | None] = []
        self.left = 0
        self.over = False
        self.began = 0.0
        self._ready: list[int] = []  # Places that are answered and not sent.
        self._taken_in = False
        self._leaving = False

    def settle(self, place: int, reply: Reply) -> None:
        """Take the answer to one request. Only the first counts."""
        if self.over or self.replies[place] is not None:
            return
        self.replies[place] = reply
        if type(reply) is Failed:
            self.serving.failed(reply.code)
        self.left -= 1
        self._ready.append(place)
        if not self._taken_in:
            return
        if not self.left and not self.is_array:
            self._send()
        elif (not self.left or self.partial) and not self._leaving:
            # What is answered within the same step of the loop goes back together.
            self._leaving = True
            self.serving.loop.call_soon(self._send)

    def taken_in(self, budget: float) -> None:
        """Every request has been handed over: send what is answered, and watch over the rest."""
        self._taken_in = True
        if self.left:
            self.serving.open.add(self)
            self.serving.deadlines.watch(self, max(budget, 0.0), _nothing)
        if not self.left or (self.partial and self._ready):
            self._send()

    def answer(self, reply: Any) -> None:
        """Called by the deadline: what is not answered by now never will be."""
        if self.left:
            late = Failed.of(CacheTimeoutError("no answer", self.serving.address, 0.0))
            for place, given in enumerate(self.replies):
                if given is None:
                    self.settle(place, late)

    def refuse(self, error: CacheError) -> None:
        """Answer a message that cannot be read."""
        if self.content_type.partition(";")[0].strip().lower() not in {MSGPACK, JSON}:
            self.content_type = MSGPACK
        failed = Failed.of(error)
        self._publish(encode(failed, self.content_type), self._headers(failed))

    def _send(self) -> None:
        self._leaving = False
        places, self._ready = self._ready, []
        if not places:
            return
        serving = self.serving
        serving.busy += (serving.clock.monotonic() - self.began) * len(places)
        if not self.left:
            self.over = True
            self.serving.done(self)
        if not self.reply_to:
            self._dead(places)
            return
        limit = self.serving.connection.max_payload - HEADROOM
        if self.is_array:
            self._send_array(places, limit)
        else:
            self._publish(*self._single(self.replies[0], limit))

    def _single(self, reply: Any, limit: int) -> tuple[bytes, dict[str, str]]:
        body, failed = self._encoded(reply, limit)
        return body, self._headers(failed)

    def _send_array(self, places: list[int], limit: int) -> None:
        if not self.partial:
            places = list(range(len(self.replies)))
        parts = [self._encoded(self.replies[place], limit)[0] for place in places]
        bundle: list[int] = []
        size = first = 0
        for number, part in enumerate(parts):
            if bundle and size + len(part) > limit:
                if not self.partial:
                    error = CacheCapacityError("the answers are too large for the bus", sum(map(len, parts)), limit)
                    self.refuse(error)
                    return
                self._send_bundle(bundle, parts[first:number])
                bundle, size, first = [], 0, number
            bundle.append(places[number])
            size += len(part) + 1
        self._send_bundle(bundle, parts[first:])

    def _send_bundle(self, places: list[int], parts: list[bytes]) -> None:
        headers = self._headers(None)
        if len(places) != len(self.replies) or places != list(range(len(places))):
            headers[INDEX] = ",".join(map(str, places))
        self._publish(join(parts, self.content_type), headers)

    def _encoded(self, reply: Any, limit: int) -> tuple[bytes, Failed | None]:
        try:
            body = encode(reply, self.content_type)
            if len(body) <= limit:
                return body, reply if isinstance(reply, Failed) else None
            failed = Failed.of(CacheCapacityError("the answer is too large for the bus", len(body), limit))
        except CacheError as error:
            failed = Failed.of(error)
        return encode(failed, self.content_type), failed

    def _headers(self, failed: Failed | None) -> dict[str, str]:
        headers: dict[str, str] = {}
        if self.content_type != MSGPACK:
            headers[CONTENT_TYPE] = JSON if self.content_type.startswith(JSON) else MSGPACK
        if self.request_id is not None:
            headers[REQUEST_ID] = self.request_id
        if failed is not None:
            headers[ERROR] = failed.detail[:_ERROR_LENGTH].encode("ascii", "replace").decode()
            headers[ERROR_CODE] = failed.code
        return headers

    def _publish(self, body: bytes, headers: dict[str, str]) -> None:
        if not self.reply_to:
            return
        try:
            self.serving.connection.write(self.reply_to, body, headers=headers or None)
        except CacheError:
            self.serving.counters.lost_replies += 1

    def _dead(self, places: list[int]) -> None:
        serving = self.serving
        for place in places:
            reply, message = self.replies[place], self.messages[place]
            if isinstance(reply, Failed):
                wire_name = "" if isinstance(message, BadMessage) else message.WIRE_NAME
                serving.emitter.emit(DeadLetter(address=serving.address, wire_name=wire_name, reason=reply.detail))


def _nothing() -> None:
    pass
