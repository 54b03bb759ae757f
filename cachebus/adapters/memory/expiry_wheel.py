"""Proactive expiry without a full scan and without a timer for each entry.

This is a hierarchical timing wheel (Varghese and Lauck, SOSP 1987). The slots of a level are 64 times as wide as those
of the level below. An entry is placed on the level that fits its remaining time. When its slot is due, it moves down.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterable, Iterator

from .eviction import NEVER, Entry

RESOLUTION = 0.1
"""Width of the lowest slots, in seconds. An expired entry may use memory for that long, but cannot be read."""

DROPPED = float("-inf")
"""Value of `expires_at` for an entry that the store has dropped."""

_SLOTS = 64
_WIDTHS = tuple(RESOLUTION * _SLOTS**level for level in range(6))


class ExpiryWheel:
    """Timing wheel with the expiring entries of one store.

    An entry that is dropped or extended stays in its slot. When the slot is due, dropped entries are skipped and
    extended entries are rescheduled. The store checks `crowded` and calls `rebuild`, so that such leftovers never
    outnumber the entries by much. Times are on the store's monotonic clock.
    """

    def __init__(self, on_due: Callable[[float], None]) -> None:
        self._on_due = on_due
        self.clear()

    def clear(self) -> None:
        self._slots: dict[float, list[Entry]] = {}
        self._heap: list[float] = []
        self._references = 0

    def schedule(self, entry: Entry, now: float, at: float | None = None) -> None:
        """Schedule an entry for its expiry, or for the time `at`."""
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
            if due <= now:  # Because of rounding. A slot that is already due would be examined again and again.
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
        """Return the time of the next slot, or `None` if the wheel is empty."""
        return self._heap[0] if self._heap else None

    def take_expired(self, now: float, budget: int = sys.maxsize) -> Iterator[Entry]:
        """Yield each expired entry once. The caller must drop it before it requests the next.

        Examines at most `budget` entries. If that is not enough, `due` still returns a time in the past.
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
                if expires_at in (DROPPED, NEVER):
                    continue
                if expires_at <= now:
                    yield entry
                else:
                    self.schedule(entry, now)
            del self._slots[heapq.heappop(self._heap)]

    def crowded(self, entries: int) -> bool:
        """Return true if more than half of the references must be leftovers, for a store with `entries` entries."""
        return self._references > 2 * entries + _SLOTS

    def rebuild(self, entries: Iterable[Entry], now: float) -> None:
        """Rebuild the wheel from `entries`, without leftovers."""
        self.clear()
        for entry in entries:
            if entry.expires_at != NEVER:
                self.schedule(entry, now)
