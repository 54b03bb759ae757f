"""Asking over NATS: requests to one address leave together where they can, and come back as they are answered.

A request leaves at once if nothing to its address is under way. Otherwise it leaves with what else came up by the next
step of the loop, and while `window` messages are unanswered it waits for one of their answers, or for 10 ms: whoever
took them may be dead, and others may serve the address too.

    token                 one message under way, a `Flight`; answers come to `<inbox>.<token>`
    Cachebus-Budget       the seconds left, one number, or one for each request of an array where they differ
    traceparent           the W3C trace context of the request; of those of an array, if it is the same
    Cachebus-Traceparents the trace contexts of an array where they differ, one for each request or empty
    Cachebus-Partial      an array may be answered bit by bit
    Cachebus-Index        in an answer: which requests of the array it answers; all, if it is left out

An idempotent request that is not answered within `resend_after` seconds is sent once more. The others are never sent
twice.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from asyncio import _get_running_loop
from collections import deque
from collections.abc import Callable
from typing import Any

from nats.aio.msg import Msg

from cachebus.messages import (
    BadMessage,
    CacheCapacityError,
    CacheClosed,
    CacheConnectionError,
    CacheError,
    DeadLetter,
    Failed,
    Message,
    NoSuchActor,
    Overloaded,
    Reply,
)

from .api import Envelope, Turn
from .clock import Clock
from .codec import MSGPACK, decode_each, encode, join
from .deadlines import TICK, Deadlines, deadlines_here
from .emitter import Emitter
from .nats_connection import NatsConnection
from .nats_headers import BUDGET, CONTENT_TYPE, INDEX, PARTIAL, say_budgets, say_traces
from .nats_options import NatsCounters

HEADROOM = 4096
"""Bytes of a NATS message that are left to headers and to what an array adds."""

_FEW = 16  # Requests that are not worth two messages.
_HOLD = 0.01  # Seconds that requests wait for an answer to others, at most.


class Item:
    """One request on its way: what came from the caller, and its bytes."""

    __slots__ = ("envelope", "part", "sent")

    def __init__(self, envelope: Envelope, part: bytes) -> None:
        self.envelope = envelope
        self.part = part
        self.sent = 0


class Flight:
    """One NATS message of requests that are not all answered yet."""

    __slots__ = ("answered", "end", "items", "left", "token", "way")

    def __init__(self, way: Way, token: str, items: list[Item], end: float) -> None:
        self.way = way
        self.token = token
        self.items: list[Item | None] = list(items)
        self.left = len(items)
        self.end = end
        self.answered = False

    def answer(self, reply: Any) -> None:
        """Called by the deadlines: it is time to send again what may be sent again, or to give up."""
        self.way.overdue(self)


class Requests:
    """What one bus asks of others: the inbox, and the ways to the addresses."""

    def __init__(
        self,
        connection: NatsConnection,
        clock: Clock,
        emitter: Emitter,
        counters: NatsCounters,
        forked: Callable[[], bool],
    ) -> None:
        self.connection = connection
        self.options = connection.options
        self.clock = clock
        self.emitter = emitter
        self.counters = counters
        self.flights: dict[str, Flight] = {}
        self.loop = asyncio.get_running_loop()
        self.deadlines: Deadlines = deadlines_here()
        self.closed = forked
        self.inbox = f"{self.options.inbox_prefix}.{secrets.token_hex(11)}."
        self._tokens = itertools.count(1)
        self.ways: dict[str, Way] = {}

    async def open(self) -> None:
        """Listen for answers."""
        await self.connection.listen(f"{self.inbox}*", self._answered)

    def way(self, address: str, subject: str) -> Way:
        """The way to an address."""
        if (way := self.ways.get(address)) is None:
            way = self.ways[address] = Way(address, subject, self)
        return way

    def next_token(self) -> str:
        """A word that no other message of this bus has."""
        return f"{next(self._tokens):x}"

    def end(self, error: CacheError) -> None:
        """Answer everything that is under way or waits with an error."""
        for flight in list(self.flights.values()):
            flight.way.give_up(flight, error)
        for way in self.ways.values():
            way.refuse(error)

    def _answered(self, msg: Msg) -> None:
        flight = self.flights.get(msg.subject[len(self.inbox) :])
        if flight is None:
            self.counters.late_replies += 1
        else:
            flight.way.take(flight, msg)


class Way:
    """The way to whoever serves an address elsewhere. A `Recipient` for the bus."""

    __slots__ = ("_address", "_held", "_leaving", "_requests", "_riding", "_subject", "_under_way", "_waiting")

    def __init__(self, address: str, subject: str, requests: Requests) -> None:
        self._address = address
        self._subject = subject
        self._requests = requests
        self._waiting: deque[Item] = deque()
        self._under_way = 0  # Flights without any answer so far,
        self._riding = 0  # and the requests that are in them.
        self._leaving = False
        self._held = False

    def __repr__(self) -> str:
        return f"<Way to {self._address}, {len(self._waiting)} waiting, {self._under_way} messages under way>"

    # For the bus

    def turn(self, kind: type[Message]) -> Turn:
        return _never_here

    def post(self, envelope: Envelope) -> None:
        if _get_running_loop() is self._requests.loop:
            self._take_in(envelope)
            return
        try:
            self._requests.loop.call_soon_threadsafe(self._take_in, envelope)
        except RuntimeError:  # The loop is closed.
            self._fail(envelope, CacheClosed("the bus is closed"))

    def obstacle_to_blocking(self) -> str | None:
        if _get_running_loop() is not None:
            return "it would stop the event loop of this thread; await an asynchronous cache, or use another thread"
        return None

    # Out

    def _take_in(self, envelope: Envelope) -> None:
        requests = self._requests
        try:
            if requests.closed():
                raise CacheClosed("the bus is closed")
            if not requests.connection.up:
                raise CacheConnectionError("the connection to NATS is away", "nats")
            if len(self._waiting) >= requests.options.max_waiting and not getattr(
                envelope.message, "INVALIDATES", False
            ):
                raise Overloaded(address=self._address, capacity=requests.options.max_waiting)
            part = encode(envelope.message)
            limit = requests.connection.max_payload - HEADROOM
            if len(part) > limit:
                raise CacheCapacityError("the request is too large for the bus", len(part), limit)
        except CacheError as error:
            self._fail(envelope, error)
            return
        self._waiting.append(Item(envelope, part))
        if not self._under_way and not self._leaving:
            self._leave()
        elif self._under_way < requests.options.window:
            self._leave_soon()
        else:
            self._hold()

    def _hold(self) -> None:
        if not self._held:
            self._held = True
            self._requests.loop.call_later(_HOLD, self._let_go)

    def _leave_soon(self) -> None:
        if not self._leaving:
            self._leaving = True
            self._requests.loop.call_soon(self._leave)

    def _let_go(self) -> None:
        self._held = False
        if self._waiting:
            self._send()
        if self._waiting:
            self._hold()

    def _leave(self) -> None:
        self._leaving = False
        while self._waiting and self._under_way < self._requests.options.window:
            self._send()
        if self._waiting:
            self._hold()

    def _send(self) -> None:
        """Send a message of what waits."""
        requests, now = self._requests, self._requests.clock.monotonic()
        items, budgets = self._collect(now)
        if not items:
            return
        body = items[0].part if len(items) == 1 else join([each.part for each in items])
        headers = {BUDGET: say_budgets(budgets)}
        if len(items) > 1:
            headers[PARTIAL] = "1"
        headers.update(say_traces([each.envelope.trace for each in items]))
        longest = max(budgets)
        flight = Flight(self, requests.next_token(), items, now + longest)
        try:
            requests.connection.write(self._subject, body, requests.inbox + flight.token, headers)
        except CacheError as error:
            for item in items:
                self._fail(item.envelope, error)
            return
        requests.flights[flight.token] = flight
        self._under_way += 1
        self._riding += len(items)
        requests.counters.messages_sent += 1
        requests.counters.requests_sent += len(items)
        requests.deadlines.watch(flight, min(longest, requests.options.resend_after), _nothing)

    def _collect(self, now: float) -> tuple[list[Item], list[float]]:
        options, waiting = self._requests.options, self._waiting
        limit = min(options.batch_bytes, self._requests.connection.max_payload - HEADROOM)
        items: list[Item] = []
        budgets: list[float] = []
        size = 0
        # No more than its share of all there are: while one message is worked on there, we work on the other here.
        share = -(-(len(waiting) + self._riding) // options.window)
        most = min(options.batch, max(_FEW, share))
        while waiting and len(items) < most:
            item = waiting[0]
            if items and size + len(item.part) > limit:
                break
            waiting.popleft()
            envelope = item.envelope
            # Who sends without waiting for an answer has as much time as anybody.
            left = options.budget if envelope.deadline is None else envelope.deadline - now
            gone = envelope.port is not None and not envelope.port.waiting
            if left <= 0 or (gone and not getattr(envelope.message, "INVALIDATES", False)):
                continue  # The caller's own deadline answers it.
            item.sent += 1
            items.append(item)
            budgets.append(left)
            size += len(item.part)
        return items, budgets

    # Back

    def take(self, flight: Flight, msg: Msg) -> None:
        """An answer to a flight has come."""
        headers = msg.headers or {}
        self._landed(flight)
        if headers.get("Status") == "503":
            self.give_up(flight, NoSuchActor(address=self._address))
            return
        try:
            replies, is_array = decode_each(msg.data, headers.get(CONTENT_TYPE, MSGPACK))
            if is_array:
                index = headers.get(INDEX)
                places = range(len(flight.items)) if index is None else map(int, index.split(","))
                answers = list(zip(places, replies, strict=True))
            else:
                answers = [(place, replies[0]) for place in range(len(flight.items))]
            for place, reply in answers:
                self._settle(flight, place, reply)
        except CacheError as error:
            self.give_up(flight, error)
        except (ValueError, IndexError):
            self.give_up(flight, BadMessage("the answer does not fit the requests"))
        else:
            # After the callers were woken, so that what they ask next leaves together. One alone shall not wait.
            if self._waiting or len(answers) > 1:
                self._leave_soon()

    def _settle(self, flight: Flight, place: int, reply: Message | BadMessage) -> None:
        item = flight.items[place]
        if item is None:
            return
        flight.items[place] = None
        flight.left -= 1
        if not flight.left:
            self._requests.flights.pop(flight.token, None)
        if isinstance(reply, Reply):
            self._give(item.envelope, reply)
        else:
            error = reply if isinstance(reply, BadMessage) else BadMessage("the answer is not a reply")
            self._fail(item.envelope, error)

    def overdue(self, flight: Flight) -> None:
        """Send again what may be sent again; give up what has no time left."""
        requests = self._requests
        if requests.flights.get(flight.token) is not flight:
            return
        self._landed(flight)
        now = requests.clock.monotonic()
        if now >= flight.end - TICK:
            del requests.flights[flight.token]
            self._leave()
            return
        for item in flight.items:
            if item is not None and item.sent == 1 and getattr(item.envelope.message, "IDEMPOTENT", False):
                requests.counters.requests_resent += 1
                self._waiting.append(item)
        requests.deadlines.watch(flight, flight.end - now, _nothing)
        if self._waiting:
            self._leave()

    def _landed(self, flight: Flight) -> None:
        """A flight has its first answer, or counts as lost: others may leave."""
        if not flight.answered:
            flight.answered = True
            self._under_way -= 1
            self._riding -= len(flight.items)

    def give_up(self, flight: Flight, error: CacheError) -> None:
        """Answer all that is left of a flight with an error."""
        self._requests.flights.pop(flight.token, None)
        self._landed(flight)
        for item in flight.items:
            if item is not None:
                self._fail(item.envelope, error)
        flight.items = []

    def refuse(self, error: CacheError) -> None:
        """Answer all that waits with an error."""
        while self._waiting:
            self._fail(self._waiting.popleft().envelope, error)

    def _give(self, envelope: Envelope, reply: Reply) -> None:
        if (port := envelope.port) is None:
            if isinstance(reply, Failed):
                self._dead(envelope.message, reply.detail)
        elif port.waiting:
            port.answer(reply)
        else:
            self._requests.counters.late_replies += 1

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
