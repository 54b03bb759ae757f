"""Proactive expiry: which entries are due, without looking at the others and without a timer for each.

A hierarchical timing wheel (Varghese and Lauck, SOSP 1987). A level's slots are 64 times as wide as those of the level
below. An entry waits in a slot as wide as its remaining time allows, and moves down when that slot comes up.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterable, Iterator

from .eviction import NEVER, Entry

RESOLUTION = 0.1
"""Width of the lowest slots, in seconds: how long an expired entry may linger. It is unreadable all the same."""

GONE = float("-inf")
"""The `expires_at` of an entry that the store has dropped."""

_SLOTS = 64
_WIDTHS = tuple(RESOLUTION * _SLOTS**level for level in range(6))


class ExpiryWheel:
    """The entries of one store that expire, by when they are due.

    An entry that is dropped or prolonged stays in its slot. When the slot comes up, dropped entries are passed over and
    prolonged ones are put back. The store asks `crowded` and calls `rebuild`, so that there are at most as many such
    leftovers as entries. Instants are on the store's monotonic clock.
    """

    def __init__(self, on_due: Callable[[float], None]) -> None:
        self._on_due = on_due
        self.clear()

    def clear(self) -> None:
        self._slots: dict[float, list[Entry]] = {}
        self._heap: list[float] = []
        self._references = 0

    def schedule(self, entry: Entry, now: float, at: float | None = None) -> None:
        """Take in an entry that expires; it is looked at when its time is up, or at `at`."""
        expires_at = entry.expires_at if at is None else at
        left = expires_at - now
        width = RESOLUTION
        if left < width * _SLOTS:
            due = (expires_at // width + 1) * width
        else:
            for width in _WIDTHS[1:]:
                if left < width * _SLOTS:
                    break
            due = expires_at // width * width
            if due <= now:  # By rounding. A slot that has come up already would be looked at over and over.
                due += width
        slot = self._slots.get(due)
        if slot is None:
            slot = self._slots[due] = []
            heapq.heappush(self._heap, due)
            if self._heap[0] == due:
                self._on_due(due)
        slot.append(entry)
        self._references += 1

    def due(self) -> float | None:
        """When the next slot comes up; `None` while there is none."""
        return self._heap[0] if self._heap else None

    def take_expired(self, now: float, budget: int = sys.maxsize) -> Iterator[Entry]:
        """Yield the entries whose time is up, each once. The caller drops each before it asks for the next.

        Looks at no more than `budget` entries. If that is not enough, `due` still returns a time that has passed.
        """
        while self._heap and self._heap[0] <= now:
            slot = self._slots[self._heap[0]]
            while slot:
                if budget <= 0:
                    return
                budget -= 1
                entry = slot.pop()
                self._references -= 1
                expires_at = entry.expires_at
                if expires_at in (GONE, NEVER):
                    continue
                if expires_at <= now:
                    yield entry
                else:
                    self.schedule(entry, now)
            del self._slots[heapq.heappop(self._heap)]

    def crowded(self, entries: int) -> bool:
        """Whether more than half of what is kept here must be leftovers, in a store of `entries`."""
        return self._references > 2 * entries + _SLOTS

    def rebuild(self, entries: Iterable[Entry], now: float) -> None:
        """Start over with `entries`, without leftovers."""
        self.clear()
        for entry in entries:
            if entry.expires_at != NEVER:
                self.schedule(entry, now)
