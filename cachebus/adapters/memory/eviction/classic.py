"""The eviction policies LRU, LFU and SIEVE."""

from __future__ import annotations

from collections.abc import Callable

from .entry import Entry, Ring


class LruPolicy:
    """Policy that evicts the least recently read or written entry.

    A hit moves the entry, which is slower than in a lazy policy. A scan of cold keys flushes the whole cache.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._ring = Ring()
        self.changing = False
        self.on_hit: Callable[[Entry], None] | None = self._touch

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


class SievePolicy:
    """SIEVE policy (Zhang et al., NSDI 2024), which evicts the first unvisited entry between its hand and the newest.

    Unlike in CLOCK, surviving entries keep their position, so new entries are examined soon. The policy is lazy: a hit
    only increments a counter. `evict` passes each visited entry once and resets it, so its cost is amortised over hits.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._ring = Ring()
        self._hand: Entry | None = None
        self.on_hit: Callable[[Entry], None] | None = None
        self.changing = False

    def admit(self, entry: Entry) -> None:
        entry.visits = 0
        self._ring.append(entry)

    def forget(self, entry: Entry) -> None:
        if entry is self._hand:
            self._hand = self._ring.younger(entry)
        self._ring.remove(entry)

    def evict(self) -> Entry:
        ring = self._ring
        entry = self._hand or ring.oldest()
        while entry.visits:
            entry.visits = 0
            entry = ring.younger(entry) or ring.oldest()
        self._hand = ring.younger(entry)
        ring.remove(entry)
        return entry

    def clear(self) -> None:
        self._ring.clear()
        self._hand = None

    def __len__(self) -> int:
        return self._ring.size


class _Bucket(Ring):
    """Entries with the same frequency, linked to the buckets of the next lower and the next higher frequency in use."""

    __slots__ = ("frequency", "higher", "lower")

    def __init__(self, frequency: int) -> None:
        super().__init__()
        self.frequency = frequency
        self.higher: _Bucket | None = None
        self.lower: _Bucket | None = None


class LfuPolicy:
    """Policy that evicts the entry with the fewest hits since its admission (Shah, Mitra and Matani, 2010).

    Among entries with the same count, the one that reached it first is evicted first. A new entry has a count of 1.
    Counts do not age, so the policy suits only workloads with constant popularity. `Entry.visits` holds the count. The
    buckets are linked, so that the next higher one is found without a search.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self._lowest: _Bucket | None = None
        self._size = 0
        self.changing = False
        self.on_hit: Callable[[Entry], None] | None = self._touch

    def _after(self, lower: _Bucket | None, frequency: int) -> _Bucket:
        """Return the bucket of `frequency`.

        If there is none, create it after `lower`, or as the lowest if that is `None`.
        """
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
