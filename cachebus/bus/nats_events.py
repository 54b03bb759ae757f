"""Events over NATS: what is told here goes out, and what is told elsewhere is heard.

What goes out is numbered by subject, which is by kind and backend: in the copy that is sent, `epoch` is when this bus was
opened and `seq` counts from 1. So whoever listens to any choice of kinds can see that one of them did not arrive. What
comes in is checked in the same way; a gap, or a time in which the connection was away, is told to the listeners of this
process as `EventsMissed`.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from asyncio import _get_running_loop
from collections import OrderedDict, deque
from collections.abc import Callable

from nats.aio.msg import Msg

from cachebus.messages import CacheError, Event, EventsMissed

from .codec import JSON, MSGPACK, decode, encode
from .emitter import Emitter
from .event_policy import EventPolicy
from .nats_connection import Listener, NatsConnection, end_task
from .nats_options import NatsCounters
from .subjects import Subjects
from .subscription import Audience

logger = logging.getLogger("cachebus.bus")

_ENOUGH = 1024 * 1024  # Bytes that may wait for the socket before events wait for them.
_BREATHER = 64  # Events sent without letting other tasks run.
_ORIGINS = 10_000  # Numberings that are remembered; of those not heard for longest, the next event begins anew.


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
        self._content_type = JSON if options.events_as_json else MSGPACK
        self._headers = {"Content-Type": self._content_type}
        self._events: deque[Event] = deque()
        self._epoch = time.time_ns()
        self._last: dict[str, int] = {}
        self._loop = asyncio.get_running_loop()
        self._wake: asyncio.Future[None] | None = None
        self._woken = False
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

    async def close(self, grace: float) -> None:
        """Send what waits, for up to `grace` seconds."""
        task, self._task = self._task, None
        if task is None:
            return
        limit = self._loop.time() + grace
        while self._events and self._connection.up and self._loop.time() < limit:
            self.wake()
            await asyncio.sleep(0.001)
        await end_task(task)
        self._counters.events_dropped += len(self._events)
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
                await self._wake
                continue
            while self._events and self._connection.up:
                if self._connection.backlog > _ENOUGH or sent % _BREATHER == 0:
                    await asyncio.sleep(0)
                sent += 1
                self._send_one(self._events.popleft())

    def _send_one(self, event: Event) -> None:
        try:
            subject = self._subjects.event(type(event), event.backend)
            number = self._last.get(subject, 0) + 1
            told = copy.copy(event)
            header: dict[str, object] = {"epoch": self._epoch, "seq": number}
            if self._policy.redacts and (key := getattr(event, "key", "")):
                header["key"] = self._policy.key(key)
            told.stamp(header)
            self._connection.write(subject, encode(told, self._content_type), headers=self._headers)
            self._last[subject] = number
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
        self._last: OrderedDict[tuple[str, int, str], int] = OrderedDict()
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
        for kind in wanted - self._listeners.keys():
            self._listeners[kind] = await self._connection.listen(self._subjects.events(kind), self._heard)
        for kind in self._listeners.keys() - wanted:
            await self._connection.leave(self._listeners.pop(kind))

    def _heard(self, msg: Msg) -> None:
        try:
            event = decode(msg.data, (msg.headers or {}).get("Content-Type", JSON))
        except CacheError:
            self._counters.bad_messages += 1
            return
        if not isinstance(event, Event) or event.namespace != self._subjects.namespace:
            self._counters.bad_messages += 1
            return
        self._counters.events_received += 1
        self._check(event, msg.subject)
        self._audience.hear_foreign(event)

    def _check(self, event: Event, subject: str) -> None:
        numbering = (event.origin, event.epoch, subject)
        last = self._last.get(numbering)
        if event.seq > (last or 0):
            self._last[numbering] = event.seq
        self._last.move_to_end(numbering)
        if len(self._last) > _ORIGINS:
            self._last.popitem(last=False)
        if last is not None and event.seq > last + 1:
            missed = event.seq - last - 1
            self._counters.events_missed += missed
            self._emitter.emit(EventsMissed(source=event.origin, event=event.WIRE_NAME, count=missed))


def _soon(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        return  # The loop is closed, and the bus with it.
