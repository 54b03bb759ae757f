"""Entries of a memory store: limits, expiry, tags, and counters of removals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from cachebus.actors.ports import Clock, DeferredReply, ReadListener, RemovalListener, WriteListener, is_interruption
from cachebus.messages import (
    CacheCapacityError,
    CacheSerializationError,
    Found,
    Loaded,
    LoadMetadata,
    RemovalCause,
    Stale,
    Ttl,
)

from ..common.validation import time_stale, time_to_live
from .eviction import NEVER, VISITS_MAX, Entry, WeighedEntry, make_policy
from .expiry_wheel import DROPPED, ExpiryWheel
from .tags import TagTable

ENTRY_OVERHEAD = 250
"""Size of an entry without its value, in bytes: the object, its key, and its references in the dict and the wheel."""

_REPLACED = RemovalCause.REPLACED


class LoadRecord(NamedTuple):
    """Metadata of a loaded value, its original time to live, and the time until which it may be served stale."""

    metadata: LoadMetadata
    lifetime: float | None
    stale_until: float


class EntryTable:
    """Entries of a `MemoryStore`. The parameters are those of `MemoryStore`.

    An entry is in the dictionary, in the policy and, if it expires, in the wheel. It counts for its tags and the total
    weight. Only methods of this class change these.
    """

    def __init__(
        self,
        max_entries: int | None,
        max_bytes: int | None,
        default_ttl: float | None,
        policy: str,
        weigher: Callable[[Any], int],
        clock: Clock,
    ) -> None:
        for name, bound in (("max_entries", max_entries), ("max_bytes", max_bytes)):
            if bound is not None and bound < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, not {bound!r}")
        if default_ttl is not None and not 0 < default_ttl < NEVER:
            raise ValueError(f"default_ttl must be a positive number of seconds, or None, not {default_ttl!r}")
        self._on_read: list[ReadListener] = []
        self.on_write: WriteListener | None = None
        self.on_removal: RemovalListener | None = None
        self.on_due: Callable[[float], None] | None = None
        self.defer: Callable[[], DeferredReply] | None = None
        self._counts = [0, 0]  # Hits and misses.
        self.sets = 0
        self._removals = dict.fromkeys(RemovalCause, 0)
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._default_ttl = default_ttl
        self._weigher = weigher
        self.now = clock.monotonic
        self._weight = 0
        self._entries: dict[str, Entry] = {}
        self._find = self._entries.get
        self._policy = make_policy(policy, max_entries)
        self._on_hit = self._policy.on_hit
        self._wheel = ExpiryWheel(self.announce_due)
        self._tags = TagTable()
        # In a separate dict, because few entries have metadata, and another slot would make every entry larger.
        self._metadata_of: dict[str, LoadRecord] = {}
        # Keys that are being loaded, and the callback that ends a load when another caller writes the key.
        self._leased: Mapping[str, object] = {}
        self._on_overwrite: Callable[[Entry], None] = lambda entry: None
        # The key that is being written, or "" for other changes. If it is set when a turn begins, the last turn was
        # interrupted.
        self._changing: str | None = None
        # A version is the Unix time of the write, increased if two would be equal, so a restart never repeats one.
        self._epoch = clock.wall() - clock.monotonic()
        self.version = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def on_read(self) -> ReadListener | None:
        """Callback for each read, called with the key and true for a hit."""
        return self._on_read[0] if self._on_read else None

    @on_read.setter
    def on_read(self, hook: ReadListener | None) -> None:
        self._on_read[:] = [] if hook is None else [hook]

    def live(self, key: str, now: float) -> Entry | None:
        """Return the entry of a key if it is valid and has not expired."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_at <= now:
            self._expire(entry, now)
            return None
        if entry.tags and not self._tags.valid(entry):
            self._drop(entry, RemovalCause.EXPLICIT)
            return None
        return entry

    def _expire(self, entry: Entry, now: float) -> None:
        """Drop an expired entry, unless it may still be served stale."""
        kept = self._metadata_of.get(entry.key)
        if kept is None or kept.stale_until <= now:
            self._drop(entry, RemovalCause.EXPIRED)

    def found(self, entry: Entry, now: float) -> Found:
        """Return the reply for a live entry."""
        version, left = entry.version, entry.expires_at - now
        ttl = left if left < NEVER else None
        if (kept := self._metadata_of.get(entry.key)) is None:
            return Found(entry.value, version, ttl, entry.tags, version)
        load = kept.metadata
        return Loaded(
            entry.value, version, ttl, entry.tags, version, load.load_time, load.stale_for, load.etag, kept.lifetime
        )

    def stale(self, key: str, now: float, lease: str = "", remaining: float = 0.0) -> Stale | None:
        """Return the reply for an expired entry that may still be served, or `None`."""
        entry, kept = self._entries.get(key), self._metadata_of.get(key)
        if entry is None or kept is None or entry.expires_at > now or kept.stale_until <= now:
            return None
        if entry.tags and not self._tags.valid(entry):
            return None
        version, load = entry.version, kept.metadata
        return Stale(entry.value, version, entry.tags, version, load.load_time, load.etag, lease, remaining)

    def keep_metadata(self, entry: Entry, metadata: LoadMetadata, now: float) -> None:
        """Store the metadata of the load that produced the value of an entry."""
        lifetime = None if entry.expires_at == NEVER else entry.expires_at - now
        self._metadata_of[entry.key] = LoadRecord(metadata, lifetime, entry.expires_at + time_stale(metadata))

    def write(self, key: str, value: Any, ttl: Ttl, tags: tuple[str, ...], now: float) -> Entry:
        """Store a value under a key. Raises `CacheError`."""
        # This is the hot path of every write, so calls are inlined: each would cost 50 ns.
        expires_at = NEVER if ttl is None else now + ttl if type(ttl) is float and ttl > 0 else self._expiry(ttl, now)
        weight = 0 if self._max_bytes is None else self._weigh(value)
        version = now + self._epoch
        if version <= self.version:
            version = math.nextafter(self.version, NEVER)
        self.version = version
        self.sets += 1
        self._changing = key
        entry = self._find(key)
        if entry is None:
            self._make_room(1, weight)
            if self._max_bytes is None:
                entry = Entry(key, value, version, expires_at, tags)
            else:
                entry = WeighedEntry(key, value, version, expires_at, tags)
                entry.weight = weight
                self._weight += weight
            self._entries[key] = entry
            self._policy.admit(entry)
            if tags:
                self._tags.attach(tags)
            if expires_at != NEVER:
                self._wheel.schedule(entry, now)
                self._compact_wheel()
        else:
            if entry.expires_at > now and not entry.tags and self.on_removal is None:
                self._removals[_REPLACED] += 1  # Inlined from `_replaced`.
            else:
                self._replaced(entry, now)
            if tags or entry.tags:
                self._tags.attach(tags)
                self._tags.detach(entry.tags)
                entry.tags = tags
            entry.version = version
            entry.value = value
            if self._metadata_of and self._metadata_of.pop(key, None) is not None:
                entry.expires_at = NEVER  # Its slot in the wheel may be that of the end of its stale time.
            if expires_at < entry.expires_at:
                self._expire_at(entry, expires_at, now)
            else:
                entry.expires_at = expires_at
            if self._on_hit is not None:
                self._on_hit(entry)
            elif entry.visits < VISITS_MAX:
                entry.visits += 1
            if self._max_bytes is not None:
                self._reweigh(entry, weight)
        self._changing = None
        if self._leased:
            self._on_overwrite(entry)
        if self.on_write is not None:
            self._notify_write(entry, now)
        return entry

    def _replaced(self, entry: Entry, now: float) -> None:
        """Count and report the removal of a value that is about to be replaced."""
        valid = not entry.tags or self._tags.valid(entry)
        cause = RemovalCause.EXPIRED if entry.expires_at <= now else _REPLACED if valid else RemovalCause.EXPLICIT
        self._removals[cause] += 1
        if (hook := self.on_removal) is not None:
            hook(entry.key, cause)

    def _reweigh(self, entry: Entry, weight: int) -> None:
        """Update the weight of an entry, and evict others if the total weight is too large."""
        assert isinstance(entry, WeighedEntry)
        self._weight += weight - entry.weight
        entry.weight = weight
        if self._max_bytes is not None and self._weight > self._max_bytes:
            # The entry leaves the policy during the eviction, so that it is not evicted itself.
            self._policy.forget(entry)
            self._make_room(0, 0)
            self._policy.admit(entry)

    def _make_room(self, entries: int, weight: int) -> None:
        """Evict entries until `entries` more entries with a total `weight` fit into the store."""
        most, heaviest = self._max_entries, self._max_bytes
        while (most is not None and len(self._entries) + entries > most) or (
            heaviest is not None and self._weight + weight > heaviest and len(self._policy)
        ):
            self._unlist(self._policy.evict(), RemovalCause.SIZE)
            self._compact_wheel()

    def _drop(self, entry: Entry, cause: RemovalCause) -> None:
        self._changing = entry.key
        self._policy.forget(entry)
        self._unlist(entry, cause)
        self._compact_wheel()
        self._changing = None

    def _compact_wheel(self) -> None:
        """Rebuild the wheel if it has too many leftover references."""
        if self._wheel.crowded(len(self._entries)):
            self._wheel.rebuild(self._entries.values(), self.now())

    def _unlist(self, entry: Entry, cause: RemovalCause) -> None:
        del self._entries[entry.key]
        if self._metadata_of:
            self._metadata_of.pop(entry.key, None)
        self._removals[cause] += 1
        if entry.tags:
            self._tags.detach(entry.tags)
        if isinstance(entry, WeighedEntry):
            self._weight -= entry.weight
        if entry.expires_at != NEVER:
            entry.expires_at = DROPPED
        entry.value = None  # The wheel may keep a reference to the entry for a while, but the value is freed now.
        if (hook := self.on_removal) is not None:
            hook(entry.key, cause)

    def _drop_all(self) -> None:
        self._changing = ""
        dropped = list(self._entries.values())
        self._entries.clear()
        # The entries link to each other, so only the garbage collector frees them. Free their values now.
        for entry in dropped:
            entry.value = None
        self._policy.clear()
        self._wheel.clear()
        self._tags.clear()
        self._metadata_of.clear()
        self._weight = 0
        self._changing = None

    def _repair_entries(self) -> None:
        """Rebuild all indexes after an interrupted turn. An entry that was being written is removed."""
        if self._changing is None and not self._policy.changing:
            return
        entries = self._entries
        if self._changing is not None:
            entries.pop(self._changing, None)
        self._changing = ""
        for key in self._metadata_of.keys() - entries.keys():
            del self._metadata_of[key]
        self._weight = sum(entry.weight for entry in entries.values() if isinstance(entry, WeighedEntry))
        self._tags.rebuild(entries.values())
        self._policy.clear()
        for entry in entries.values():
            visits = entry.visits
            self._policy.admit(entry)
            if self._on_hit is None:
                entry.visits = visits
        self._policy.changing = False
        self._wheel.rebuild(entries.values(), self.now())
        self._make_room(0, 0)
        self._changing = None

    def _delete(self, keys: tuple[str, ...]) -> int:
        now = self.now()
        deleted = 0
        for key in keys:
            if (entry := self.live(key, now)) is not None:
                self._drop(entry, RemovalCause.EXPLICIT)
                deleted += 1
            elif (stale := self._entries.get(key)) is not None:
                self._drop(stale, RemovalCause.EXPIRED)
        return deleted

    def _hit(self, entry: Entry) -> None:
        if self._on_hit is not None:
            self._on_hit(entry)
        elif entry.visits < VISITS_MAX:
            entry.visits += 1

    def _expire_at(self, entry: Entry, expires_at: float, now: float) -> None:
        # The wheel reschedules an entry when its current slot is due, so only an earlier expiry needs a new slot.
        sooner = expires_at < entry.expires_at
        entry.expires_at = expires_at
        if sooner:
            self._wheel.schedule(entry, now)
            self._compact_wheel()

    def _expiry(self, ttl: Ttl, now: float) -> float:
        seconds = self._default_ttl if ttl == "default" else ttl
        return NEVER if seconds is None else now + time_to_live(seconds)

    def _next_version(self, now: float) -> float:
        version = now + self._epoch
        if version <= self.version:
            version = math.nextafter(self.version, NEVER)
        self.version = version
        return version

    def _weigh(self, value: Any) -> int:
        if self._max_bytes is None:
            return 0
        try:
            result: Any = self._weigher(value)
            weight = result + ENTRY_OVERHEAD
        except Exception as error:
            if is_interruption(error):
                raise
            raise CacheSerializationError(
                f"the weigher failed on a value of type {type(value).__name__}: {type(error).__name__}"
            ) from error
        if not isinstance(weight, int) or weight < ENTRY_OVERHEAD:
            raise CacheSerializationError(
                f"the weigher must return a size in bytes, an int of 0 or more, not {result!r}"
            )
        if weight > self._max_bytes:
            raise CacheCapacityError("the value is larger than the memory store", weight, self._max_bytes)
        return int(weight)

    # Notifications

    def announce_due(self, when: float) -> None:
        """Report that the next expiry is now earlier, at `when`."""
        if (hook := self.on_due) is not None:
            hook(when)

    def _notify_write(self, entry: Entry, now: float) -> None:
        if (hook := self.on_write) is not None:
            left = entry.expires_at - now
            hook(entry.key, entry.version, left if left < NEVER else None, entry.tags)
