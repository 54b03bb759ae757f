"""Keys in the order in which they are due: the one queue behind timers, leases, locks and rate limits."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")

_SLACK = 64


class TimerQueue(Generic[K]):
    """A priority queue of keys, each with the one instant at which it is due. Not for use by several threads at once.

    The heap is lazy: a key that moves to a later instant, or is discarded, costs a dictionary entry. Its old place is
    dropped when it comes up, or when more than half of the heap is such places, so the heap is bounded by twice the
    number of keys. Keys that are due at the same instant come in the order in which they were set.
    """

    __slots__ = ("_due", "_heap", "_numbers")

    def __init__(self) -> None:
        self._due: dict[K, float] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, key: object) -> bool:
        return key in self._due

    def __iter__(self) -> Iterator[K]:
        return iter(self._due)

    def set(self, key: K, when: float) -> bool:
        """Let a key be due at `when`, whatever was set for it before. Return whether none is due earlier than it."""
        before = self._due.get(key)
        self._due[key] = when
        if before is not None and before <= when:
            return False  # Its place in the heap comes up earlier, and it is moved then.
        heapq.heappush(self._heap, (when, next(self._numbers), key))
        self._tidy()
        return self._heap[0][0] >= when

    def set_earlier(self, key: K, when: float) -> bool:
        """As `set`, unless the key is due by then already."""
        before = self._due.get(key)
        return (before is None or when < before) and self.set(key, when)

    def discard(self, key: K) -> None:
        """Take a key out, if it is there."""
        if self._due.pop(key, None) is not None:
            self._tidy()

    def due(self) -> float:
        """The instant at which to look for what is due: the earliest one, or earlier if a key was moved; else infinity."""
        heap, due = self._heap, self._due
        while heap:
            when, _, key = heap[0]
            if key in due:
                return when
            heapq.heappop(heap)
        return math.inf

    def pop(self, now: float) -> K | None:
        """Take out the first key that is due at `now`; `None` if none is."""
        return next(self.expire(now), None)

    def expire(self, now: float, limit: float = math.inf) -> Iterator[K]:
        """Take out each key that is due at `now`, the earliest first. Looks at no more than `limit` keys."""
        heap, due = self._heap, self._due
        while heap and heap[0][0] <= now and limit > 0:
            noted, number, key = heap[0]
            when = due.get(key)
            if when is None or when < noted:
                heapq.heappop(heap)
            elif when > noted:
                heapq.heapreplace(heap, (when, number, key))
                limit -= when > now  # Otherwise it is counted when it is taken out.
            else:
                limit -= 1
                heapq.heappop(heap)
                del due[key]
                yield key

    def clear(self) -> None:
        """Take everything out."""
        self._due.clear()
        self._heap.clear()

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._due) + _SLACK:
            # In place, because `expire` may be under way.
            self._heap[:] = [(when, number, key) for number, (key, when) in enumerate(self._due.items())]
            heapq.heapify(self._heap)
            self._numbers = itertools.count(len(self._heap))
