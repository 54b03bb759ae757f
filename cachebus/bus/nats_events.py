"""Events over NATS: what is told here goes out, and what is told elsewhere is heard.

What goes out is numbered by subject, which is by kind and backend: in the copy that is sent, `epoch` is when this bus was
opened and `seq` counts from 1. So whoever listens to any choice of kinds can see that one of them did not arrive. An event
that is dropped here takes its number with it. What comes in is checked in the same way, see `nats_beats.py`; a gap, or a time in which the connection was away, is told to the listeners of this
process as `EventsMissed`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from asyncio import _get_running_loop
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from msgspec.structs import replace
from nats.aio.msg import Msg

from cachebus.messages import CacheConnectionError, CacheError, Event, EventsMissed, Heartbeat

from .codec import JSON, MSGPACK, decode, encode
from .emitter import Emitter
from .event_policy import EventPolicy
from .nats_beats import Gaps
from .nats_connection import Listener, NatsConnection, end_task
from .nats_options import NatsCounters
from .nats_stream import MESSAGE_ID
from .subjects import Subjects
from .subscription import Audience, EventKind

logger = logging.getLogger("cachebus.bus")

_ENOUGH = 1024 * 1024  # Bytes that may wait for the socket before events wait for them.
_BREATHER = 64  # Events sent without letting other tasks run.


class Outbox:
    """Events on their way out: bounded, and off the path of whoever tells them. Put into from any thread."""

    def __init__(
        self, connection: NatsConnection, subjects: Subjects, policy: EventPolicy, counters: NatsCounters
    ) -> None:
        options = connection.options
        self._connection = connection
        self._subjects = subjects
        self._policy = policy
        self._counters = counters
        self._capacity = options.outbox
        self.content_type = JSON if options.events_as_json else MSGPACK
        self._headers = {"Content-Type": self.content_type}
        self._kept = options.events_stream is not None
        self._events: deque[Event] = deque()
        self.epoch = time.time_ns()
        self._last: dict[str, int] = {}
        self._skipped: Counter[str] = Counter()
        self._guard = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._wake: asyncio.Future[None] | None = None
        self._woken = False
        self._idle: asyncio.Future[None] | None = None  # Answered when nothing can be sent any more, or now.
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._events)

    def __repr__(self) -> str:
        return f"<Outbox {len(self._events)}/{self._capacity} waiting, {self._counters.events_dropped} dropped>"

    def open(self) -> None:
        """Begin to send."""
        self._task = asyncio.create_task(self._send(), name="cachebus-outbox")

    def put(self, event: Event) -> None:
        """Take an event, or count it as dropped. Does not wait."""
        if len(self._events) >= self._capacity:
            self._counters.events_dropped += 1
            self._skip(event)
            return
        self._events.append(event)
        if not self._woken:
            self._woken = True
            self.wake()

    def wake(self) -> None:
        """Look whether something can be sent. From any thread."""
        if _get_running_loop() is self._loop:
            self._wake_up()
            return
        try:
            self._loop.call_soon_threadsafe(self._wake_up)
        except RuntimeError:
            self._counters.events_dropped += 1  # The loop is closed.

    def numbers(self) -> dict[str, int]:
        """The last number by subject, from the kind on, of what is sent and of what is dropped. On the loop."""
        with self._guard:
            skipped, self._skipped = self._skipped, Counter()
        for subject, count in skipped.items():
            self._last[subject] = self._last.get(subject, 0) + count
        start = len(self._subjects.event_prefix)
        return {subject[start:]: last for subject, last in self._last.items()}

    async def close(self, grace: float) -> None:
        """Send what waits, for up to `grace` seconds."""
        task, self._task = self._task, None
        if task is None:
            return
        if self._events and self._connection.up:
            self._idle = self._loop.create_future()
            self._wake_up()
            await asyncio.wait([self._idle, task], timeout=grace, return_when=asyncio.FIRST_COMPLETED)
        await end_task(task)
        self._counters.events_dropped += len(self._events)
        for event in self._events:
            self._skip(event)
        self._events.clear()

    def _wake_up(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _send(self) -> None:
        sent = 0
        while True:
            self._wake = self._loop.create_future()
            # Not woken any more from here on: what is put in from now on wakes, and what was put in before is seen.
            self._woken = False
            if not self._events or not self._connection.up:
                if self._idle is not None and not self._idle.done():
                    self._idle.set_result(None)
                await self._wake
                continue
            while self._events and self._connection.up:
                if self._connection.backlog > _ENOUGH or sent % _BREATHER == 0:
                    await asyncio.sleep(0)
                sent += 1
                self._send_one(self._events.popleft())

    def _skip(self, event: Event) -> None:
        """An event will not be sent: its number is left out. From any thread."""
        try:
            subject = self._subjects.event(type(event), event.backend)
        except ValueError:
            return  # It could not have been sent.
        with self._guard:
            self._skipped[subject] += 1

    def _send_one(self, event: Event) -> None:
        try:
            subject = self._subjects.event(type(event), event.backend)
            number = self._last.get(subject, 0) + 1
            if self._skipped:
                with self._guard:
                    number += self._skipped.pop(subject, 0)
            self._last[subject] = number  # Also if it cannot be sent: then it is missed.
            header: dict[str, Any] = {"epoch": self.epoch, "seq": number}
            if self._policy.redacts and (key := getattr(event, "key", "")):
                header["key"] = self._policy.key(key)
            headers = {**self._headers, MESSAGE_ID: event.id} if self._kept else self._headers
            self._connection.write(subject, encode(replace(event, **header), self.content_type), headers=headers)
            self._counters.events_sent += 1
        except (CacheError, ValueError) as error:
            self._counters.events_dropped += 1
            logger.debug("an event %s cannot be sent: %s", event.WIRE_NAME, error)
        except Exception:
            # A bug, and one event: the others still go out.
            self._counters.events_dropped += 1
            logger.exception("an event %s cannot be sent", event.WIRE_NAME)


class Hearing:
    """Events of other processes, for the listeners of this one."""

    def __init__(
        self,
        connection: NatsConnection,
        subjects: Subjects,
        audience: Audience,
        emitter: Emitter,
        counters: NatsCounters,
    ) -> None:
        self._connection = connection
        self._subjects = subjects
        self._audience = audience
        self._emitter = emitter
        self._counters = counters
        self._loop = asyncio.get_running_loop()
        self._listeners: dict[type[Event], Listener] = {}
        self._gaps = Gaps(subjects, emitter, counters, self._behind)
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()

    def open(self) -> None:
        """Begin to listen to what the listeners of this process want."""
        self._task = asyncio.create_task(self._follow(), name="cachebus-hearing")
        self._audience.watch(self.look)

    async def close(self) -> None:
        """Listen no more."""
        self._audience.unwatch(self.look)
        task, self._task = self._task, None
        if task is not None:
            await end_task(task)

    def look(self) -> None:
        """Listeners came or went. From any thread."""
        if _get_running_loop() is self._loop:
            self._look()
            return
        _soon(self._loop, self._look)

    async def settled(self) -> None:
        """Return when NATS knows of every listener that there was at the call. Raises `CacheConnectionError`."""
        await asyncio.sleep(0)
        await self._settled.wait()
        await self._connection.flush()

    def missed_some(self) -> None:
        """The connection was away: nobody knows what was told meanwhile."""
        self._emitter.emit(EventsMissed(source="", event="", count=0))

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
                logger.exception("what other processes tell cannot be listened to")
            if not self._changed.is_set():
                self._settled.set()

    async def _follow_once(self) -> None:
        wanted = self._audience.listened_to - {EventsMissed}
        if wanted:
            wanted |= {Heartbeat}
        fresh = wanted - self._listeners.keys()
        for kind in fresh:
            self._listeners[kind] = await self._connection.listen(self._subjects.events(kind), self._heard)
        left = self._listeners.keys() - wanted
        self._gaps.listens_to(frozenset(self._listeners.keys() - fresh - left))
        for kind in left:
            await self._connection.leave(self._listeners.pop(kind))
        if fresh:
            # Before the server knows of a kind, a heartbeat may count events that nobody would have sent here. Without a
            # connection everything is listened to again when it is back, and that something is missing is told anyway.
            with suppress(CacheConnectionError):
                await self._connection.flush()
            self._gaps.listens_to(frozenset(self._listeners))

    def _heard(self, msg: Msg) -> None:
        try:
            event = decode(msg.data, (msg.headers or {}).get("Content-Type", JSON))
        except CacheError:
            self._counters.bad_messages += 1
            return
        if not isinstance(event, Event) or event.namespace != self._subjects.namespace:
            self._counters.bad_messages += 1
            return
        if isinstance(event, Heartbeat):
            self._gaps.beat(event)
        else:
            self._counters.events_received += 1
            self._gaps.check(event, msg.subject)
        self._audience.hear_foreign(event)

    def _behind(self, kind: EventKind) -> bool:
        listener = self._listeners.get(kind)
        return listener is not None and listener.waiting > 0


def _soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        return  # The loop is closed, and the bus with it.
