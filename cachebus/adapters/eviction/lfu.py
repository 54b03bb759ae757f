"""Least frequently used, with every operation O(1)."""

from __future__ import annotations

from collections.abc import Callable

from .entry import Entry, Ring


class _Bucket(Ring):
    """The entries of one frequency, linked to the buckets of the next lower and the next higher one in use."""

    __slots__ = ("frequency", "higher", "lower")

    frequency: int
    higher: _Bucket | None
    lower: _Bucket | None

    def __init__(self, frequency: int) -> None:
        super().__init__()
        self.frequency = frequency
        self.higher = None
        self.lower = None


class LfuPolicy:
    """Gives up the entry with the fewest hits since it was admitted (Shah, Mitra and Matani, 2010).

    Of entries with equally many hits, the one that reached that number first goes first; a newcomer counts as
    one use. Counts do not age: once popular is for ever popular, so it suits only a popularity that stands still.

    `Entry.visits` is the number of uses. The bucket list is what keeps `forget` O(1): when the lowest bucket
    becomes empty, the next one is a link away and not a search.
    """

    __slots__ = ("_buckets", "_lowest", "_size", "changing", "on_hit")

    on_hit: Callable[[Entry], None] | None

    def __init__(self, capacity: int | None = None) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._lowest: _Bucket | None = None
        self._size = 0
        self.changing = False
        self.on_hit = self._touch

    def _after(self, lower: _Bucket | None, frequency: int) -> _Bucket:
        """The bucket of `frequency`, made next to `lower` (`None` for the lowest place) when there is none."""
        bucket = self._buckets.get(frequency)
        if bucket is None:
            bucket = self._buckets[frequency] = _Bucket(frequency)
            higher = self._lowest if lower is None else lower.higher
            bucket.lower, bucket.higher = lower, higher
            if lower is None:
                self._lowest = bucket
            else:
                lower.higher = bucket
            if higher is not None:
                higher.lower = bucket
        return bucket

    def _leave(self, bucket: _Bucket, entry: Entry) -> None:
        bucket.remove(entry)
        if bucket.size:
            return
        del self._buckets[bucket.frequency]
        if bucket.lower is None:
            self._lowest = bucket.higher
        else:
            bucket.lower.higher = bucket.higher
        if bucket.higher is not None:
            bucket.higher.lower = bucket.lower

    def _touch(self, entry: Entry) -> None:
        self.changing = True
        bucket = self._buckets[entry.visits]
        entry.visits += 1
        target = self._after(bucket, entry.visits)
        self._leave(bucket, entry)
        target.append(entry)
        self.changing = False

    def admit(self, entry: Entry) -> None:
        entry.visits = 1
        self._after(None, 1).append(entry)
        self._size += 1

    def forget(self, entry: Entry) -> None:
        self._leave(self._buckets[entry.visits], entry)
        self._size -= 1

    def evict(self) -> Entry:
        lowest = self._lowest
        if lowest is None:
            raise IndexError("evict() of an empty policy")
        victim = lowest.oldest()
        self._leave(lowest, victim)
        self._size -= 1
        return victim

    def clear(self) -> None:
        self._buckets.clear()
        self._lowest = None
        self._size = 0

    def __len__(self) -> int:
        return self._size
