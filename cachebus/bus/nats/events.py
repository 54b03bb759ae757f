"""Events over NATS: those of this process go out, and those of others come in.

What goes out is numbered by subject, which is by kind and backend: in the copy that is sent, `epoch` is when this bus was
opened and `seq` counts from 1. So a listener to any choice of kinds can see that one of them did not arrive. An event that
is dropped here takes its number with it. A gap in what comes in, or a time in which the connection was away, is reported
to the listeners of this process as `EventsMissed`.
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

_ENOUGH = 1024 * 1024  # Bytes that may wait for the socket before events wait for them.
_PAUSE = 0.002  # Seconds until it is looked again whether fewer bytes wait.
_FIRST_LINE = b"NATS/1.0\r\nContent-Type:"
_GROUP = 32  # Events that are written at once: they may be large.
_TURN = 128  # Events that are sent before other tasks run.
_ORIGINS = 10_000  # Numberings that are remembered, at most; those not heard for longest are forgotten.


class _Channel(Struct, eq=False):
    """The events of one kind about one backend: their subject, the beginning of each frame, and the number of the last."""

    subject: str
    opening: bytes
    last: int = 0


class Outbox:
    """Events on their way out: a bounded queue that any thread puts into, and that is emptied beside its callers."""

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
        self._kept = options.events_stream is not None
        self._events: deque[Event] = deque()
        self.epoch = time.time_ns()
        self._channels: dict[tuple[EventKind, str], _Channel] = {}
        self._skipped: Counter[tuple[EventKind, str]] = Counter()
        self._guard = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._scheduled = False  # A flush will come, and see what was put in before it.
        self._open = False
        self._idle: asyncio.Future[None] | None = None  # Answered when nothing can be sent any more, or now.

    def __repr__(self) -> str:
        return f"<Outbox {len(self._events)}/{self._capacity} waiting, {self._counters.events_dropped} dropped>"

    def open(self) -> None:
        """Begin to send."""
        self._open = True
        self._flush()

    def put(self, event: Event) -> None:
        """Take an event, or count it as dropped. Does not wait."""
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
        """Look whether something can be sent. From any thread."""
        try:
            if get_ident() == self._thread:
                self._loop.call_soon(self._flush)
            else:
                self._loop.call_soon_threadsafe(self._flush)
        except RuntimeError:
            self._counters.events_dropped += 1  # The loop is closed.

    def numbers(self) -> dict[str, int]:
        """The last number by subject, from the kind on, of what is sent and of what is dropped. On the loop."""
        with self._guard:
            skipped, self._skipped = self._skipped, Counter()
        for (kind, backend), count in skipped.items():
            with suppress(ValueError):  # It could not have been sent.
                self._channel(kind, backend).last += count
        start = len(self._subjects.event_prefix)
        return {each.subject[start:]: each.last for each in self._channels.values()}

    async def close(self, grace: float) -> None:
        """Send what waits, for up to `grace` seconds."""
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
        # What is put in from now on asks for another flush, and what was put in before is seen.
        self._scheduled = False
        events, connection = self._events, self._connection
        if not self._open:
            return
        if events and connection.up:
            if connection.client.backlog > _ENOUGH:
                self._scheduled = True
                self._loop.call_later(_PAUSE, self._flush)
                return
            for _ in range(_TURN // _GROUP):
                self._send([events.popleft() for _ in range(min(len(events), _GROUP))])
                if not events or connection.client.backlog > _ENOUGH:
                    break
            if events:
                if not self._scheduled:
                    self._scheduled = True
                    self._loop.call_soon(self._flush)
                return
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def _channel(self, kind: EventKind, backend: str) -> _Channel:
        """Raises `ValueError` for a backend that no subject can hold."""
        channel = self._channels.get((kind, backend))
        if channel is None:
            subject = self._subjects.event(kind, backend)
            channel = _Channel(subject, b"HPUB %b %d " % (subject.encode(), len(self._head)))
            self._channels[kind, backend] = channel
        return channel

    def _send(self, events: list[Event]) -> None:
        """Send each event that can be sent, and count the others as dropped."""
        frames: list[bytes] = []
        try:
            numbered, channels = self._numbered(events)
            for event, channel, body in zip(numbered, channels, encode_each(numbered, self.content_type), strict=True):
                if isinstance(body, CacheError):
                    logger.debug("an event %s cannot be sent: %s", event.WIRE_NAME, body)
                    continue
                head, opening = self._head, channel.opening
                if self._kept:
                    head = header_block({"Content-Type": self.content_type, MESSAGE_ID: event.id})
                    opening = b"HPUB %b %d " % (channel.subject.encode(), len(head))
                size = len(head) + len(body)
                if size > self._connection.max_payload:
                    logger.debug("an event %s is too large for the bus", event.WIRE_NAME)
                    continue
                frames.append(b"%b%d\r\n%b%b\r\n" % (opening, size, head, body))
            self._connection.write_frames(b"".join(frames))
        except CacheError as error:
            logger.debug("%d events cannot be sent: %s", len(frames), error)
            frames.clear()
        except Exception:
            logger.exception("%d events cannot be sent", len(events))  # A bug: the events after these still go out.
            frames.clear()
        self._counters.events_sent += len(frames)
        self._counters.events_dropped += len(events) - len(frames)

    def _numbered(self, events: list[Event]) -> tuple[list[Event], list[_Channel]]:
        """The events as they go out, each with the number of its subject, and their channels. One that no subject can hold
        is left out."""
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
                    logger.debug("an event %s cannot be sent: %s", event.WIRE_NAME, error)
                    continue
            channel.last += 1  # Also if it cannot be sent: then it is missed.
            if self._skipped:
                with self._guard:
                    channel.last += self._skipped.pop((kind, event.backend), 0)
            shown = self._policy.redacted(event) if redacts else event
            numbered.append(replace(shown, epoch=epoch, seq=channel.last))
            channels.append(channel)
        return numbered, channels


class EventListener:
    """Events of other processes, for the listeners of this one."""

    def __init__(
        self, connection: NatsConnection, subjects: Subjects, subscriptions: SubscriptionRegistry, emitter: Emitter
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._namespace = subjects.namespace
        self._audience = subscriptions
        self._emitter = emitter
        self._counters = connection.counters
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[type[Event], Listener] = {}
        self._gaps = GapDetector(subjects, emitter, connection.counters)
        self._head, self._content_type = b"", JSON  # The first lines of the last event: most have the same.
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()

    def open(self) -> None:
        """Begin to subscribe what the listeners of this process want."""
        self._task = asyncio.create_task(self._follow(), name="cachebus-event-listener")
        self._audience.watch(self.look)

    async def close(self) -> None:
        """Listen no more."""
        self._audience.unwatch(self.look)
        task, self._task = self._task, None
        if task is not None:
            await end_task(task)

    def look(self) -> None:
        """Listeners came or went. From any thread."""
        if running_loop() is self._loop:
            self._look()
            return
        with suppress(RuntimeError):  # The loop is closed, and the bus with it.
            self._loop.call_soon_threadsafe(self._look)

    async def settled(self) -> None:
        """Return when NATS knows of every listener that there was at the call. Raises `CacheConnectionError`."""
        await asyncio.sleep(0)
        await self._settled.wait()
        await self._connection.flush()

    def _look(self) -> None:
        self._settled.clear()
        self._changed.set()

    async def _follow(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._follow_once()
            except Exception:
                logger.exception("events of other processes cannot be subscribed")
            if not self._changed.is_set():
                self._settled.set()

    async def _follow_once(self) -> None:
        wanted = self._audience.listened_to - {EventsMissed}
        if wanted:
            wanted |= {Heartbeat}
        fresh = wanted - self._listeners.keys()
        for kind in fresh:
            self._listeners[kind] = await self._connection.listen(self._subjects.events(kind), self._take)
        left = self._listeners.keys() - wanted
        self._gaps.listens_to(frozenset(self._listeners.keys() - fresh - left))
        for kind in left:
            await self._connection.leave(self._listeners.pop(kind))
        if fresh:
            # Before the server knows of a kind, a heartbeat may count events that it would not have sent here. Without a
            # connection everything is subscribed again when it is back, and that something is missing is reported anyway.
            with suppress(CacheConnectionError):
                await self._connection.flush()
            self._gaps.listens_to(frozenset(self._listeners))

    def _take(self, delivery: Delivery) -> None:
        head = delivery.head
        if not head.startswith(self._head) or not self._head:
            self._content_type = delivery.headers.get("Content-Type", JSON)
            # Known up to the end of the first line; a head of another form is read each time.
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
        self._audience.dispatch_remote(event)


class GapDetector:
    """Reports events of other processes that did not arrive. Belongs to one loop.

    The number of an event shows that those before it were lost. The last event before a silence has no next one, so a bus
    that has sent events publishes its last numbers at intervals, in heartbeats. Both come in the order of sending.
    """

    def __init__(self, subjects: Subjects, emitter: Emitter, counters: NatsCounters) -> None:
        self._prefix = subjects.event_prefix
        self._emitter = emitter
        self._counters = counters
        self._sure: frozenset[EventKind] = frozenset()
        self._last: OrderedDict[tuple[str, int, str], int] = OrderedDict()
        # The kinds that were subscribed at the last heartbeat of an origin: what it begins to number later begins at 1.
        self._met: OrderedDict[tuple[str, int], frozenset[EventKind]] = OrderedDict()

    def listens_to(self, kinds: frozenset[EventKind]) -> None:
        """Note that the server knows by now that these kinds are subscribed, and no others."""
        gone = {event_word(kind) for kind in self._sure - kinds}
        if gone:
            for numbering in [each for each in self._last if self._word(each[2]) in gone]:
                del self._last[numbering]
            for origin, met in self._met.items():
                self._met[origin] = met & kinds
        self._sure = kinds

    def check(self, event: Event, subject: str) -> None:
        """Note an event that came in."""
        numbering, seq = (event.origin, event.epoch, subject), event.seq
        last = self._last.get(numbering)
        if last is not None and last + 1 == seq:
            self._last[numbering] = seq
            self._last.move_to_end(numbering)
        else:
            self._reach(numbering, seq, type(event), missing=seq - 1)

    def beat(self, beat: Heartbeat) -> None:
        """Note a heartbeat that came in."""
        origin = (beat.origin, beat.epoch)
        met = self._met.get(origin, frozenset[EventKind]())
        for tail, last in beat.last.items():
            numbering = (*origin, f"{self._prefix}{tail}")
            kind = WIRE_NAMES.get(f"event.{self._word(numbering[2])}")
            if kind is None or not issubclass(kind, Event) or kind not in self._sure:
                continue
            if kind not in met and numbering not in self._last:
                self._reach(numbering, last, kind, missing=0)  # It may have been sent before this listener came.
            elif self._last.get(numbering, 0) < last:
                self._reach(numbering, last, kind, missing=last)
        self._met[origin] = self._sure
        self._met.move_to_end(origin)
        if len(self._met) > _ORIGINS:
            self._met.popitem(last=False)

    def _reach(self, numbering: tuple[str, int, str], number: int, kind: EventKind, *, missing: int) -> None:
        """Note that numbers up to `number` were sent, and that those up to `missing` which are not known did not arrive."""
        last = self._last.get(numbering)
        if last is None and kind in self._met.get(numbering[:2], ()):
            last = 0
        if number > (last or 0):
            self._last[numbering] = number
        if numbering in self._last:
            self._last.move_to_end(numbering)
        if len(self._last) > _ORIGINS:
            forgotten, _ = self._last.popitem(last=False)
            self._met.pop(forgotten[:2], None)
        if last is not None and missing > last:
            self._counters.events_missed += missing - last
            self._emitter.publish(EventsMissed(source=numbering[0], event=kind.WIRE_NAME, count=missing - last))

    def _word(self, subject: str) -> str:
        return subject.removeprefix(self._prefix).partition(".")[0]
