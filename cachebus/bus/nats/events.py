"""Events over NATS: publishing those of this process, and receiving those of other processes.

Outgoing events are numbered by subject, that is by kind and backend. In the copy that is sent, `epoch` is the time at
which this bus was opened, and `seq` counts from 1. So a listener to any selection of kinds can detect that an event
is missing. An event that is dropped here also uses up a number. If incoming events have a gap, or if the connection
was down, the listeners of this process get `EventsMissed`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from contextlib import suppress
from threading import get_ident

from msgspec import Struct
from msgspec.structs import replace

from cachebus.messages import WIRE_NAMES, CacheConnectionError, CacheError, Event, EventsMissed, Heartbeat

from ..address import Subjects, event_word
from ..codec.messages import JSON, MSGPACK, decode_one, encode_each
from ..compat import running_loop
from ..events.emitter import Emitter
from ..events.subscription import EventKind, EventPolicy, SubscriptionRegistry
from .compat import Delivery, Listener, header_block
from .connection import NatsConnection, end_task
from .jetstream import MESSAGE_ID
from .options import NatsCounters

logger = logging.getLogger("cachebus.bus")

_MAX_BACKLOG = 1024 * 1024  # Bytes waiting for the socket above which events stay in the outbox.
_PAUSE = 0.002  # Seconds until the backlog is checked again.
_FIRST_LINE = b"NATS/1.0\r\nContent-Type:"
_GROUP = 32  # Events per write; each may be large.
_EVENTS_PER_TURN = 128  # Events that are sent before other tasks run.
_ORIGINS = 10_000  # Maximum number of remembered numberings; the least recently used ones are forgotten.


class _Channel(Struct, eq=False):
    """The events of one kind about one backend: subject, start of each frame, and the last number."""

    subject: str
    opening: bytes
    last: int = 0


class Outbox:
    """The bounded queue of outgoing events. Any thread may put events; the event loop sends them."""

    def __init__(self, connection: NatsConnection, subjects: Subjects, policy: EventPolicy) -> None:
        options = connection.options
        self._connection = connection
        self._subjects = subjects
        self._policy = policy
        self._redacts = policy.redacts
        self._counters = connection.counters
        self._capacity = options.outbox
        self.content_type = JSON if options.events_as_json else MSGPACK
        self._head = header_block({"Content-Type": self.content_type})
        self._has_stream = options.events_stream is not None
        self._events: deque[Event] = deque()
        self.epoch = time.time_ns()
        self._channels: dict[tuple[EventKind, str], _Channel] = {}
        self._skipped: Counter[tuple[EventKind, str]] = Counter()
        self._guard = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._scheduled = False  # A flush is scheduled and will see all events that were put before it.
        self._open = False
        self._idle: asyncio.Future[None] | None = None  # Completed when no more events can be sent.

    def __repr__(self) -> str:
        return f"<Outbox {len(self._events)}/{self._capacity} waiting, {self._counters.events_dropped} dropped>"

    def open(self) -> None:
        """Start sending."""
        self._open = True
        self._flush()

    def put(self, event: Event) -> None:
        """Queue an event, or count it as dropped. Does not wait."""
        if len(self._events) >= self._capacity:
            self._counters.events_dropped += 1
            with self._guard:
                self._skipped[type(event), event.backend] += 1
            return
        self._events.append(event)
        if not self._scheduled:
            self._scheduled = True
            self.wake()

    def wake(self) -> None:
        """Schedule a flush. Thread-safe."""
        try:
            if get_ident() == self._thread:
                self._loop.call_soon(self._flush)
            else:
                self._loop.call_soon_threadsafe(self._flush)
        except RuntimeError:
            self._counters.events_dropped += 1  # The loop is closed.

    def numbers(self) -> dict[str, int]:
        """Return the last number by subject suffix (kind and backend), including dropped events.

        Call it on the loop.
        """
        with self._guard:
            skipped, self._skipped = self._skipped, Counter()
        for (kind, backend), count in skipped.items():
            with suppress(ValueError):  # The backend name is not valid in a subject, so no such event is sent.
                self._channel(kind, backend).last += count
        start = len(self._subjects.event_prefix)
        return {each.subject[start:]: each.last for each in self._channels.values()}

    async def close(self, grace: float) -> None:
        """Send the queued events, for up to `grace` seconds, and close."""
        if self._events and self._connection.up and self._open:
            self._idle = self._loop.create_future()
            self.wake()
            await asyncio.wait([self._idle], timeout=grace)
        self._open = False
        self._counters.events_dropped += len(self._events)
        with self._guard:
            self._skipped.update((type(event), event.backend) for event in self._events)
        self._events.clear()

    def _flush(self) -> None:
        # Events that are put from now on schedule another flush; earlier ones are seen by this one.
        self._scheduled = False
        events, connection = self._events, self._connection
        if not self._open:
            return
        if events and connection.up:
            if connection.client.backlog > _MAX_BACKLOG:
                self._scheduled = True
                self._loop.call_later(_PAUSE, self._flush)
                return
            for _ in range(_EVENTS_PER_TURN // _GROUP):
                self._send([events.popleft() for _ in range(min(len(events), _GROUP))])
                if not events or connection.client.backlog > _MAX_BACKLOG:
                    break
            if events:
                if not self._scheduled:
                    self._scheduled = True
                    self._loop.call_soon(self._flush)
                return
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _channel(self, kind: EventKind, backend: str) -> _Channel:
        """Return the channel of a kind and a backend. Raises `ValueError` if the name is not valid in a subject."""
        channel = self._channels.get((kind, backend))
        if channel is None:
            subject = self._subjects.event(kind, backend)
            channel = _Channel(subject, b"HPUB %b %d " % (subject.encode(), len(self._head)))
            self._channels[kind, backend] = channel
        return channel

    def _send(self, events: list[Event]) -> None:
        """Send the events, and count those that cannot be sent as dropped."""
        frames: list[bytes] = []
        try:
            numbered, channels = self._numbered(events)
            for event, channel, body in zip(numbered, channels, encode_each(numbered, self.content_type), strict=True):
                if isinstance(body, CacheError):
                    logger.debug("cannot send event %s: %s", event.WIRE_NAME, body)
                    continue
                head, opening = self._head, channel.opening
                if self._has_stream:
                    head = header_block({"Content-Type": self.content_type, MESSAGE_ID: event.id})
                    opening = b"HPUB %b %d " % (channel.subject.encode(), len(head))
                size = len(head) + len(body)
                if size > self._connection.max_payload:
                    logger.debug("cannot send event %s: it is too large for the bus", event.WIRE_NAME)
                    continue
                frames.append(b"%b%d\r\n%b%b\r\n" % (opening, size, head, body))
            self._connection.write_frames(b"".join(frames))
        except CacheError as error:
            logger.debug("cannot send %d events: %s", len(frames), error)
            frames.clear()
        except Exception:
            logger.exception("cannot send %d events", len(events))  # A bug. Later events are still sent.
            frames.clear()
        self._counters.events_sent += len(frames)
        self._counters.events_dropped += len(events) - len(frames)

    def _numbered(self, events: list[Event]) -> tuple[list[Event], list[_Channel]]:
        """Return numbered and redacted copies of the events, and their channels.

        Events with a backend name that is not valid in a subject are left out.
        """
        numbered: list[Event] = []
        channels: list[_Channel] = []
        epoch, known, redacts = self.epoch, self._channels, self._redacts
        for event in events:
            kind = type(event)
            channel = known.get((kind, event.backend))
            if channel is None:
                try:
                    channel = self._channel(kind, event.backend)
                except ValueError as error:
                    logger.debug("cannot send event %s: %s", event.WIRE_NAME, error)
                    continue
            channel.last += 1  # Even if it cannot be sent, so that listeners detect the gap.
            if self._skipped:
                with self._guard:
                    channel.last += self._skipped.pop((kind, event.backend), 0)
            redacted = self._policy.redacted(event) if redacts else event
            numbered.append(replace(redacted, epoch=epoch, seq=channel.last))
            channels.append(channel)
        return numbered, channels


class EventListener:
    """Receives events of other processes for the listeners of this one."""

    def __init__(
        self, connection: NatsConnection, subjects: Subjects, subscriptions: SubscriptionRegistry, emitter: Emitter
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._namespace = subjects.namespace
        self._registry = subscriptions
        self._emitter = emitter
        self._counters = connection.counters
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[type[Event], Listener] = {}
        self._gaps = GapDetector(subjects, emitter, connection.counters)
        self._head, self._content_type = b"", JSON  # First header lines of the last event; most events have the same.
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()

    def open(self) -> None:
        """Start following the subscriptions of this process."""
        self._task = asyncio.create_task(self._follow(), name="cachebus-event-listener")
        self._registry.watch(self.refresh)

    async def close(self) -> None:
        """Stop listening."""
        self._registry.unwatch(self.refresh)
        task, self._task = self._task, None
        if task is not None:
            await end_task(task)

    def refresh(self) -> None:
        """Handle a change of the local listeners. Thread-safe."""
        if running_loop() is self._loop:
            self._refresh()
            return
        with suppress(RuntimeError):  # The loop and the bus are closed.
            self._loop.call_soon_threadsafe(self._refresh)

    async def settled(self) -> None:
        """Wait until NATS knows of all current listeners. Raises `CacheConnectionError`."""
        await asyncio.sleep(0)
        await self._settled.wait()
        await self._connection.flush()

    def _refresh(self) -> None:
        self._settled.clear()
        self._changed.set()

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._follow_once()
            except Exception:
                logger.exception("cannot subscribe to events of other processes")
            if not self._changed.is_set():
                self._settled.set()

    async def _follow_once(self) -> None:
        wanted = self._registry.listened_to - {EventsMissed}
        if wanted:
            wanted |= {Heartbeat}
        fresh = wanted - self._listeners.keys()
        for kind in fresh:
            self._listeners[kind] = await self._connection.listen(self._subjects.events(kind), self._take)
        left = self._listeners.keys() - wanted
        self._gaps.set_subscribed(frozenset(self._listeners.keys() - fresh - left))
        for kind in left:
            await self._connection.leave(self._listeners.pop(kind))
        if fresh:
            # Until the server knows of the subscription, a heartbeat may count events that were not sent here. If the
            # connection is down, all kinds are subscribed again after the reconnect, and `EventsMissed` is reported
            # anyway.
            with suppress(CacheConnectionError):
                await self._connection.flush()
            self._gaps.set_subscribed(frozenset(self._listeners))

    def _take(self, delivery: Delivery) -> None:
        head = delivery.head
        if not head.startswith(self._head) or not self._head:
            self._content_type = delivery.headers.get("Content-Type", JSON)
            # Cache the head up to the end of its first line. A head of another form is parsed each time.
            end = head.find(b"\r\n", len(_FIRST_LINE)) if head.startswith(_FIRST_LINE) else -1
            self._head = b"" if end < 0 else head[: end + 2]
        try:
            event = decode_one(delivery.data, self._content_type)
        except CacheError:
            self._counters.bad_messages += 1
            return
        if not isinstance(event, Event) or event.namespace != self._namespace:
            self._counters.bad_messages += 1
            return
        if type(event) is Heartbeat:
            self._gaps.beat(event)
        else:
            self._counters.events_received += 1
            self._gaps.check(event, delivery.subject)
        self._registry.dispatch_remote(event)


class GapDetector:
    """Reports events of other processes that did not arrive. Bound to one loop.

    The number of an event reveals that earlier ones were lost. The last event before a pause has no successor, so a
    bus that has sent events publishes its last numbers periodically, in heartbeats. Events and heartbeats arrive in
    the order in which they were sent.
    """

    def __init__(self, subjects: Subjects, emitter: Emitter, counters: NatsCounters) -> None:
        self._prefix = subjects.event_prefix
        self._emitter = emitter
        self._counters = counters
        self._subscribed: frozenset[EventKind] = frozenset()
        self._last: OrderedDict[tuple[str, int, str], int] = OrderedDict()
        # The kinds that were subscribed at the last heartbeat of an origin. Numberings that it starts later begin at 1.
        self._subscribed_before: OrderedDict[tuple[str, int], frozenset[EventKind]] = OrderedDict()

    def set_subscribed(self, kinds: frozenset[EventKind]) -> None:
        """Set the kinds whose subscriptions the server knows."""
        removed = {event_word(kind) for kind in self._subscribed - kinds}
        if removed:
            for numbering in [each for each in self._last if self._word(each[2]) in removed]:
                del self._last[numbering]
            for origin, before in self._subscribed_before.items():
                self._subscribed_before[origin] = before & kinds
        self._subscribed = kinds

    def check(self, event: Event, subject: str) -> None:
        """Check the number of an incoming event."""
        numbering, seq = (event.origin, event.epoch, subject), event.seq
        last = self._last.get(numbering)
        if last is not None and last + 1 == seq:
            self._last[numbering] = seq
            self._last.move_to_end(numbering)
        else:
            self._record(numbering, seq, type(event), missing=seq - 1)

    def beat(self, beat: Heartbeat) -> None:
        """Check the numbers of an incoming heartbeat."""
        origin = (beat.origin, beat.epoch)
        before = self._subscribed_before.get(origin, frozenset[EventKind]())
        for tail, last in beat.last.items():
            numbering = (*origin, f"{self._prefix}{tail}")
            kind = WIRE_NAMES.get(f"event.{self._word(numbering[2])}")
            if kind is None or not issubclass(kind, Event) or kind not in self._subscribed:
                continue
            if kind not in before and numbering not in self._last:
                self._record(numbering, last, kind, missing=0)  # May have been sent before this process subscribed.
            elif self._last.get(numbering, 0) < last:
                self._record(numbering, last, kind, missing=last)
        self._subscribed_before[origin] = self._subscribed
        self._subscribed_before.move_to_end(origin)
        if len(self._subscribed_before) > _ORIGINS:
            self._subscribed_before.popitem(last=False)

    def _record(self, numbering: tuple[str, int, str], number: int, kind: EventKind, *, missing: int) -> None:
        """Record that numbers up to `number` were sent. Report unknown numbers up to `missing` as missed."""
        last = self._last.get(numbering)
        if last is None and kind in self._subscribed_before.get(numbering[:2], ()):
            last = 0
        if number > (last or 0):
            self._last[numbering] = number
        if numbering in self._last:
            self._last.move_to_end(numbering)
        if len(self._last) > _ORIGINS:
            forgotten, _ = self._last.popitem(last=False)
            self._subscribed_before.pop(forgotten[:2], None)
        if last is not None and missing > last:
            self._counters.events_missed += missing - last
            self._emitter.publish(EventsMissed(source=numbering[0], event=kind.WIRE_NAME, count=missing - last))

    def _word(self, subject: str) -> str:
        return subject.removeprefix(self._prefix).partition(".")[0]
