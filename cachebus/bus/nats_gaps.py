"""Detection of events of other processes that did not arrive.

The number of an event shows that those before it were lost. The last event before a silence has no next one, so a bus that
has sent events publishes its last numbers at intervals, in heartbeats.
"""

from __future__ import annotations

from collections import OrderedDict

from cachebus.messages import WIRE_NAMES, Event, EventsMissed, Heartbeat

from .address import Subjects, event_word
from .emitter import Emitter
from .nats_options import NatsCounters
from .subscription import EventKind

_ORIGINS = 10_000  # Numberings that are remembered, at most; those not heard for longest are forgotten.


class GapDetector:
    """Reports events of other processes that did not arrive to the listeners of this process. Events and heartbeats
    come in the order in which the server sent them. Belongs to one loop."""

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
            self._emitter.emit(EventsMissed(source=numbering[0], event=kind.WIRE_NAME, count=missing - last))

    def _word(self, subject: str) -> str:
        return subject.removeprefix(self._prefix).partition(".")[0]
