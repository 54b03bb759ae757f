"""Heartbeats of a bus over NATS: what was told last, and so what did not arrive.

An event that is lost is noticed by the number of the next one. The last one before a silence has no next one: so whoever
has told something says again and again how far its numbers go.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

from cachebus.messages import WIRE_NAMES, CacheError, Event, EventsMissed, Heartbeat

from .clock import Clock
from .codec import encode
from .emitter import Emitter, origin
from .nats_connection import NatsConnection, end_task
from .nats_options import NatsCounters
from .subjects import Subjects
from .subscription import EventKind

_ORIGINS = 10_000  # Numberings that are remembered; of those not heard for longest, the next event begins anew.
_PATIENCE = 0.02  # Seconds until it is looked again whether what was received before a heartbeat is handled.


class Numbers(Protocol):
    """What numbers the events that go out."""

    epoch: int
    content_type: str

    def numbers(self) -> Mapping[str, int]:
        """The last number by subject, from the kind on."""
        ...


class Beating:
    """Tells every `interval` seconds how far the numbers of this bus go, once it has told anything."""

    def __init__(
        self,
        connection: NatsConnection,
        subjects: Subjects,
        outbox: Numbers,
        clock: Clock,
        counters: NatsCounters,
        interval: float | None,
    ) -> None:
        self._connection = connection
        self._namespace = subjects.namespace
        self._subject = subjects.event(Heartbeat, "")
        self._outbox = outbox
        self._clock = clock
        self._counters = counters
        self._interval = interval
        self._count = 0
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Begin to beat."""
        if self._interval is not None:
            self._task = asyncio.create_task(self._run(self._interval), name="cachebus-heartbeat")

    async def close(self) -> None:
        """Beat once more, because no event comes after this, and no more."""
        task, self._task = self._task, None
        if task is not None:
            await end_task(task)
            self.beat()

    def beat(self) -> None:
        """Say how far the numbers go."""
        last = self._outbox.numbers()
        if self._interval is None or not last or not self._connection.up:
            return
        name = origin()
        beat = Heartbeat(
            interval=self._interval,
            last=last,
            id=f"{name}-{self._outbox.epoch:x}-beat-{self._count + 1}",
            namespace=self._namespace,
            origin=name,
            epoch=self._outbox.epoch,
            seq=self._count + 1,
            time=self._clock.wall(),
        )
        content_type = self._outbox.content_type
        try:
            self._connection.write(self._subject, encode(beat, content_type), headers={"Content-Type": content_type})
        except CacheError:
            return  # The next one says as much.
        self._count += 1
        self._counters.heartbeats_sent += 1

    async def _run(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            self.beat()


class Gaps:
    """Finds out which events of others did not arrive, and tells the listeners of this process.

    `behind` says whether messages of a kind have come in that are not handled yet: each kind has a queue of its own, so
    that a heartbeat may overtake what was sent before it. Belongs to one loop.
    """

    def __init__(
        self, subjects: Subjects, emitter: Emitter, counters: NatsCounters, behind: Callable[[EventKind], bool]
    ) -> None:
        self._prefix = subjects.event_prefix
        self._emitter = emitter
        self._counters = counters
        self._behind = behind
        self._loop = asyncio.get_running_loop()
        self._sure: frozenset[EventKind] = frozenset()
        self._last: OrderedDict[tuple[str, int, str], int] = OrderedDict()
        # Which kinds were listened to at the last heartbeat of an origin: what it begins to number later begins at 1.
        self._met: OrderedDict[tuple[str, int], frozenset[EventKind]] = OrderedDict()
        self._doubts: dict[tuple[str, int, str], int] = {}
        self._looks_again = False

    def listens_to(self, kinds: frozenset[EventKind]) -> None:
        """The server knows by now that these kinds are listened to, and no others."""
        gone = {f"{self._prefix}{_word(kind)}." for kind in self._sure - kinds}
        if gone:
            for numbering in [each for each in self._last if _start(self._prefix, each[2]) in gone]:
                del self._last[numbering]
            for origin, met in self._met.items():
                self._met[origin] = met & kinds
        self._sure = kinds

    def check(self, event: Event, subject: str) -> None:
        """An event came in."""
        self._reach((event.origin, event.epoch, subject), event.seq, type(event), missing=event.seq - 1)

    def beat(self, beat: Heartbeat) -> None:
        """A heartbeat came in."""
        origin = (beat.origin, beat.epoch)
        met = self._met.get(origin, frozenset[EventKind]())
        for tail, last in beat.last.items():
            numbering = (*origin, f"{self._prefix}{tail}")
            kind = self._kind(numbering[2])
            if kind is None or kind not in self._sure:
                continue
            if kind in met or numbering in self._last:
                self._expect(numbering, last)
            else:
                self._reach(numbering, last, kind, missing=0)  # Nobody knows what of it was told for this listener.
        self._met[origin] = self._sure
        self._met.move_to_end(origin)
        if len(self._met) > _ORIGINS:
            self._met.popitem(last=False)

    def _expect(self, numbering: tuple[str, int, str], last: int) -> None:
        kind = self._kind(numbering[2])
        if kind is None or kind not in self._sure or self._last.get(numbering, 0) >= last:
            return
        if not self._behind(kind):
            self._reach(numbering, last, kind, missing=last)
            return
        self._doubts[numbering] = last
        if not self._looks_again:
            self._looks_again = True
            self._loop.call_later(_PATIENCE, self._look_again)

    def _look_again(self) -> None:
        self._looks_again = False
        doubts, self._doubts = self._doubts, {}
        for numbering, last in doubts.items():
            self._expect(numbering, last)

    def _reach(self, numbering: tuple[str, int, str], number: int, kind: EventKind, *, missing: int) -> None:
        """Numbers up to `number` are told, and those after the last one known up to `missing` are not here."""
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
            self._emitter.emit(EventsMissed(source=numbering[0], event=kind.WIRE_NAME, count=missing - last))

    def _kind(self, subject: str) -> EventKind | None:
        kind = WIRE_NAMES.get(f"event.{subject.removeprefix(self._prefix).partition('.')[0]}")
        return kind if kind is not None and issubclass(kind, Event) else None


def _word(kind: EventKind) -> str:
    return kind.WIRE_NAME.removeprefix("event.")


def _start(prefix: str, subject: str) -> str:
    return f"{prefix}{subject.removeprefix(prefix).partition('.')[0]}."
