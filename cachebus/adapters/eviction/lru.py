"""Least recently used: the rule to compare the others with."""

from __future__ import annotations

from collections.abc import Callable

from .entry import Entry, Ring


class LruPolicy:
    """Gives up the entry that was read or stored longest ago.

    Hits move the entry in the ring, so a hit costs more than under a lazy policy. One scan of cold keys
    flushes the lot, and a loop larger than the cache gets no hit at all.
    """

    __slots__ = ("_ring", "changing", "on_hit")

    on_hit: Callable[[Entry], None] | None

    def __init__(self, capacity: int | None = None) -> None:
        self._ring = Ring()
        self.changing = False
        self.on_hit = self._touch

    def _touch(self, entry: Entry) -> None:
        self.changing = True
        ring = self._ring
        ring.remove(entry)
        ring.append(entry)
        self.changing = False

    def admit(self, entry: Entry) -> None:
        self._ring.append(entry)

    def forget(self, entry: Entry) -> None:
        self._ring.remove(entry)

    def evict(self) -> Entry:
        victim = self._ring.oldest()
        self._ring.remove(victim)
        return victim

    def clear(self) -> None:
        self._ring.clear()

    def __len__(self) -> int:
        return self._ring.size
