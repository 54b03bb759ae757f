"""The memory store, which keeps values by reference in the memory of the process."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from cachebus.actors.ports import SYSTEM_CLOCK, Capabilities, Clock, DeferredReply, Gauges
from cachebus.messages import (
    Add,
    Admit,
    Clear,
    Cleared,
    CompareAndSet,
    Delete,
    Deleted,
    DeleteMany,
    DeletePattern,
    Exists,
    Found,
    FoundMany,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    Incremented,
    Invalidated,
    InvalidateTags,
    Missing,
    NotStored,
    Present,
    ReleaseLease,
    RemovalCause,
    RenewLease,
    Reply,
    Request,
    Scan,
    Scanned,
    Set,
    SetMany,
    Stored,
    StoredMany,
    Touch,
    WrongType,
)

from ..common.glob import compile_glob
from ..common.rate_limit import MeterTable
from .entries import EntryTable
from .eviction import NEVER, VISITS_MAX, Entry
from .leases import LeaseTable

_MISSING = Missing()
_MAX_OBJECTS = 10_000


def estimate_size(value: Any) -> int:
    """Estimate the size in bytes of `value` and the objects it refers to. Each object counts once.

    The estimate follows containers, instance dictionaries and slots, and uses `nbytes` of arrays. After 10,000 objects
    it extrapolates, so it takes at most a few milliseconds.
    """
    seen: set[int] = set()
    stack = [value]
    total = 0
    largest = 0
    while stack:
        current = stack.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        size = sys.getsizeof(current, 64)
        if not isinstance(current, (str, bytes, bytearray, int, float, complex, type, type(None))):
            nbytes = getattr(current, "nbytes", None)
            if isinstance(nbytes, int):
                size = max(size, nbytes)  # The size of an array that owns its data already includes them.
            else:
                stack.extend(_parts(current))
                largest = max(largest, size)
        total += size
        if len(seen) >= _MAX_OBJECTS:
            # Exclude the largest container from the average: its size already covers references to all its items.
            return total + (total - largest) * len(stack) // len(seen)
    return total


def _parts(current: Any) -> Iterable[Any]:
    kind = current.__class__
    if issubclass(kind, dict):
        yield from current.keys()
        yield from current.values()
    elif issubclass(kind, (list, tuple, set, frozenset, deque)):
        yield from current
    yield from getattr(current, "__dict__", {}).values()
    for cls in kind.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(current, name):
                yield getattr(current, name)


class MemoryStore(EntryTable):
    """An `InlineStore` in the memory of the process.

    Values are stored by reference: mutating one affects every reader. The store is not thread-safe; the turns of its
    actor serialize access to it.

    Args:
        max_entries: Maximum number of entries, or `None` for no limit.
        max_bytes: Maximum total size according to `weigher`, plus an overhead per entry, or `None` for no limit.
        default_ttl: Default time to live in seconds, or `None` for no expiry.
        policy: Name of the eviction policy.
        weigher: Function that returns the size of a value in bytes.
        clock: Source of time.
        max_leases: Maximum number of keys that are loaded at a time.
        max_limits: Maximum number of rate limits in use.
    """

    name = "memory"
    capabilities = Capabilities(
        patterns=True, tags=True, compare_and_set=True, counters=True, leases=True, rate_limits=True, locks=True
    )

    def __init__(
        self,
        *,
        max_entries: int | None = 10_000,
        max_bytes: int | None = None,
        default_ttl: float | None = None,
        policy: str = "s3fifo",
        weigher: Callable[[Any], int] = estimate_size,
        clock: Clock = SYSTEM_CLOCK,
        max_leases: int = 10_000,
        max_limits: int = 100_000,
    ) -> None:
        super().__init__(max_entries, max_bytes, default_ttl, policy, weigher, clock)
        self._leases = LeaseTable(self, max_leases=max_leases)
        self._leased, self._on_overwrite = self._leases.by_key, self._leases.on_overwrite
        self._rate_limits = MeterTable(clock.monotonic, self.announce_due, max_limits)
        self.get = self._reader()
        self._verbs: Mapping[type[Request[Any]], Callable[[Any], Any]] = {
            Get: self.get,
            GetMany: self.get_many,
            Exists: self.exists,
            Set: self.set,
            SetMany: self.set_many,
            Add: self.add,
            CompareAndSet: self.compare_and_set,
            Touch: self.touch,
            Increment: self.increment,
            Delete: self.delete,
            DeleteMany: self.delete,
            DeletePattern: self.delete_pattern,
            Scan: self.scan,
            InvalidateTags: self.invalidate_tags,
            Clear: self.clear,
            GetOrLease: self._leases.get_or_lease,
            RenewLease: self._leases.renew,
            ReleaseLease: self._leases.release,
            Admit: self._rate_limits.admit,
        }

    def __repr__(self) -> str:
        bounds = f"{len(self._entries)}/{self._max_entries or 'unbounded'} entries"
        return f"<MemoryStore {bounds}{f', {self._weight}/{self._max_bytes} bytes' if self._max_bytes else ''}>"

    async def open(self) -> None:
        """Do nothing."""

    async def close(self) -> None:
        """Drop all values."""
        self._drop_all()
        self._rate_limits.clear()
        self._leases.clear()  # The actor, which is stopping, answers the waiters.

    def verb(self, kind: type[Request[Any]]) -> Callable[[Any], Reply] | None:
        return self._verbs.get(kind)

    def gauges(self) -> Gauges:
        return Gauges(
            hits=self._counts[0],
            misses=self._counts[1],
            sets=self.sets,
            removals=dict(self._removals),
            entries=len(self._entries),
            max_entries=self._max_entries,
            weight=self._weight,
            max_bytes=self._max_bytes,
        )

    # Reading

    def _reader(self) -> Callable[[Get], Found | Missing]:
        # The hottest path of the library. A closure avoids attribute lookups, which saves 50 ns.
        find, now, valid, loaded = self._find, self.now, self._tags.valid, self._metadata_of
        on_hit, on_read, counts = self._on_hit, self._on_read, self._counts

        def get(request: Get) -> Found | Missing:
            entry = find(request.key)
            if entry is not None:
                left = entry.expires_at - now()
                if left > 0 and (not entry.tags or valid(entry)):
                    if on_hit is not None:
                        on_hit(entry)
                    elif entry.visits < VISITS_MAX:
                        entry.visits += 1
                    counts[0] += 1
                    if on_read:
                        on_read[0](request.key, True)
                    if loaded and request.key in loaded:
                        return self.found(entry, now())
                    version = entry.version
                    return Found(entry.value, version, left if left < NEVER else None, entry.tags, version)
                if left <= 0:
                    self._expire(entry, now())
                else:
                    self._drop(entry, RemovalCause.EXPLICIT)
            counts[1] += 1
            if on_read:
                on_read[0](request.key, False)
            return _MISSING

        return get

    def get_many(self, request: GetMany) -> FoundMany:
        entries: dict[str, Found] = {}
        for key in request.keys:
            if key not in entries and isinstance(reply := self.get(Get(key)), Found):
                entries[key] = reply
        return FoundMany(entries)

    def exists(self, request: Exists) -> Present | Missing:
        entry = self.live(request.key, self.now())
        return _MISSING if entry is None else self._present(entry)

    def scan(self, request: Scan) -> Scanned:
        """Return all matching keys in one page. The cursor is ignored, because no state is kept between calls."""
        return Scanned(tuple(entry.key for entry in self._matching(request.pattern)))

    # Writing

    def set(self, request: Set) -> Stored | NotStored:
        now = self.now()
        if request.lease is not None:
            return self._leases.set_leased(request, request.lease, now)
        if request.only_if is not None:
            entry = self.live(request.key, now)
            if (entry is None) != (request.only_if == "absent"):
                return NotStored(0.0 if entry is None else entry.version)
        return Stored(self.write(request.key, request.value, request.ttl, request.tags, now).version)

    def set_many(self, request: SetMany) -> StoredMany:
        now = self.now()
        for value in request.items.values():
            self._weigh(value)  # Check all values before any is stored, so that the write is atomic.
        for key, value in request.items.items():
            self.write(key, value, request.ttl, request.tags, now)
        return StoredMany(len(request.items))

    def add(self, request: Add) -> Stored | NotStored:
        now = self.now()
        if (entry := self.live(request.key, now)) is not None:
            return NotStored(entry.version)
        return Stored(self.write(request.key, request.value, request.ttl, request.tags, now).version)

    def compare_and_set(self, request: CompareAndSet) -> Stored | NotStored:
        now = self.now()
        entry = self.live(request.key, now)
        if entry is None or entry.version != request.version:
            return NotStored(0.0 if entry is None else entry.version)
        return Stored(self.write(request.key, request.value, request.ttl, request.tags, now).version)

    def touch(self, request: Touch) -> Present | Missing:
        now = self.now()
        expires_at = self._expiry(request.ttl, now)
        entry = self.live(request.key, now)
        if entry is None:
            return _MISSING
        self._changing = ""
        self._expire_at(entry, expires_at, now)
        self._changing = None
        self._hit(entry)
        return self._present(entry)

    def increment(self, request: Increment) -> Incremented | Missing:
        now = self.now()
        entry = self.live(request.key, now)
        if entry is None:
            if request.initial is None:
                return _MISSING
            before = request.initial
        elif type(before := entry.value) is not int:
            raise WrongType(f"increment requires an int, not {type(before).__name__}")
        value = before + request.delta
        if not -(2**63) <= value < 2**63:
            raise WrongType("the result of increment exceeds a signed 64-bit integer; the value is unchanged")
        if entry is None:
            self.write(request.key, value, request.ttl, (), now)
            return Incremented(value)
        weight = self._weigh(value)
        self._changing = request.key
        self._replaced(entry, now)
        entry.value = value
        entry.version = self._next_version(now)
        if self._max_bytes is not None:
            self._reweigh(entry, weight)
        self._changing = None
        self._hit(entry)
        if self._leased:
            self._on_overwrite(entry)
        self._notify_write(entry, now)
        return Incremented(value)

    # Removing

    def delete(self, request: Delete | DeleteMany) -> Deleted:
        keys = request.keys if isinstance(request, DeleteMany) else (request.key,)
        if self._leased:
            for key in keys:
                self._leases.revoke(key)
        return Deleted(self._delete(keys))

    def delete_pattern(self, request: DeletePattern) -> Deleted:
        matches = compile_glob(request.pattern).fullmatch
        self._leases.revoke_all(matches)
        matching = self._matching(request.pattern)
        # Also delete stale values, although they are not live.
        now = self.now()
        self._delete(tuple(key for key in self._metadata_of if matches(key) and self._entries[key].expires_at <= now))
        for entry in matching:
            self._drop(entry, RemovalCause.EXPLICIT)
        return Deleted(len(matching))

    def invalidate_tags(self, request: InvalidateTags) -> Invalidated:
        version = self._next_version(self.now())
        for tag in request.tags:
            self._tags.invalidate(tag, version)
        if self._leased:
            self._leases.revoke_tags(request.tags, version)
        return Invalidated()

    def clear(self, request: Clear) -> Cleared:
        self._removals[RemovalCause.EXPLICIT] += len(self._entries)
        self._leases.revoke_all()
        self._drop_all()
        return Cleared()

    def next_expiry(self) -> float | None:
        due = self._wheel.due()
        other = min(self._leases.due(), self._rate_limits.due())
        return due if due is not None and due <= other else other if other < NEVER else None

    def sweep(self, limit: int) -> int:
        now = self.now()
        self._leases.advance(now)
        self._rate_limits.sweep(limit)
        swept = 0
        self._changing = ""
        for entry in self._wheel.take_expired(now, limit):
            kept = self._metadata_of.get(entry.key)
            if kept is not None and kept.stale_until > now:
                self._wheel.schedule(entry, now, kept.stale_until)
                continue
            self._policy.forget(entry)
            self._unlist(entry, RemovalCause.EXPIRED)
            swept += 1
        self._compact_wheel()  # Not inside the loop: it replaces the wheel.
        self._changing = None
        return swept

    def repair(self) -> Collection[DeferredReply]:
        """Restore consistency after an interrupted turn, and return the replies that are still pending.

        An entry that was being written may be missing, but no entry is wrong.
        """
        self._repair_entries()
        self._rate_limits.repair()
        return self._leases.repair(self.now())

    # Helpers

    def _matching(self, pattern: str) -> list[Entry]:
        matches = compile_glob(pattern).fullmatch
        now = self.now()
        found = [entry for key, entry in self._entries.items() if matches(key)]
        return [entry for entry in found if self.live(entry.key, now) is entry]

    def _present(self, entry: Entry) -> Present:
        left = entry.expires_at - self.now()
        return Present(entry.version, left if left < NEVER else None)
