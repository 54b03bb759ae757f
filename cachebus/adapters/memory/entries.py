"""The entries of a memory store: bounded, expiring, tagged, and every removal accounted for."""

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
from .expiry_wheel import GONE, ExpiryWheel
from .tags import TagTable

ENTRY_OVERHEAD = 250
"""Bytes that a store spends on an entry besides the value: the entry, its key, its places in dict and wheel."""

_REPLACED = RemovalCause.REPLACED


class LoadRecord(NamedTuple):
    """Metadata of a loaded value, the time to live that it was given, and the time until which it may be served stale."""

    metadata: LoadMetadata
    lifetime: float | None
    stale_until: float


class EntryTable:
    """Entries of a `MemoryStore`, by the parameters of that.

    An entry is in the dictionary, in the policy and, if it expires, in the wheel, and it counts for its tags and towards
    the weight. Only the methods here change any of these.
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
                raise ValueError(f"{name} must be at least 1, or None for no bound, not {bound!r}")
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
        # Beside the entries, because few have one and a slot more would make each of them larger.
        self._metadata_of: dict[str, LoadRecord] = {}
        # The keys that are being loaded, and what ends the load of one that another caller has written.
        self._leased: Mapping[str, object] = {}
        self._overtaken: Callable[[Entry], None] = lambda entry: None
        # The key that is being written, "" for other changes. Still set when a turn begins, the last one was interrupted.
        self._changing: str | None = None
        # A version is the Unix time of storing, pushed up if two would be equal, so that no restart brings one back.
        self._epoch = clock.wall() - clock.monotonic()
        self.version = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def on_read(self) -> ReadListener | None:
        """What is called with the key of each read, and whether that was a hit."""
        return self._on_read[0] if self._on_read else None

    @on_read.setter
    def on_read(self, hook: ReadListener | None) -> None:
        self._on_read[:] = [] if hook is None else [hook]

    def live(self, key: str, now: float) -> Entry | None:
        """Return the entry of a key that may still be read."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_at <= now:
            self._lapse(entry, now)
            return None
        if entry.tags and not self._tags.valid(entry):
            self._drop(entry, RemovalCause.EXPLICIT)
            return None
        return entry

    def _lapse(self, entry: Entry, now: float) -> None:
        """Drop an entry whose time is up, unless it may still be served as stale."""
        kept = self._metadata_of.get(entry.key)
        if kept is None or kept.stale_until <= now:
            self._drop(entry, RemovalCause.EXPIRED)

    def found(self, entry: Entry, now: float) -> Found:
        """Return the reply that says a live entry."""
        version, left = entry.version, entry.expires_at - now
        ttl = left if left < NEVER else None
        if (kept := self._metadata_of.get(entry.key)) is None:
            return Found(entry.value, version, ttl, entry.tags, version)
        load = kept.metadata
        return Loaded(
            entry.value, version, ttl, entry.tags, version, load.load_time, load.stale_for, load.etag, kept.lifetime
        )

    def stale(self, key: str, now: float, lease: str = "", remaining: float = 0.0) -> Stale | None:
        """Return the reply that says what may still be served of a key without a live value."""
        entry, kept = self._entries.get(key), self._metadata_of.get(key)
        if entry is None or kept is None or entry.expires_at > now or kept.stale_until <= now:
            return None
        if entry.tags and not self._tags.valid(entry):
            return None
        version, load = entry.version, kept.metadata
        return Stale(entry.value, version, entry.tags, version, load.load_time, load.etag, lease, remaining)

    def keep_metadata(self, entry: Entry, metadata: LoadMetadata, now: float) -> None:
        """Note how the value of an entry was loaded."""
        lifetime = None if entry.expires_at == NEVER else entry.expires_at - now
        self._metadata_of[entry.key] = LoadRecord(metadata, lifetime, entry.expires_at + time_stale(metadata))

    def write(self, key: str, value: Any, ttl: Ttl, tags: tuple[str, ...], now: float) -> Entry:
        """Store a value under a key. Raises `CacheError`."""
        # Every write comes through here, so what happens on each is written out: a call costs 50 ns.
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
                self._tidy()
        else:
            if entry.expires_at > now and not entry.tags and self.on_removal is None:
                self._removals[_REPLACED] += 1  # As `_replaced` does.
            else:
                self._replaced(entry, now)
            if tags or entry.tags:
                self._tags.attach(tags)
                self._tags.detach(entry.tags)
                entry.tags = tags
            entry.version = version
            entry.value = value
            if self._metadata_of and self._metadata_of.pop(key, None) is not None:
                entry.expires_at = NEVER  # It may stand in the wheel where its stale time ends.
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
            self._overtaken(entry)
        if self.on_write is not None:
            self._tell_write(entry, now)
        return entry

    def _replaced(self, entry: Entry, now: float) -> None:
        """Account for the value that an entry is about to lose to a new one."""
        valid = not entry.tags or self._tags.valid(entry)
        cause = RemovalCause.EXPIRED if entry.expires_at <= now else _REPLACED if valid else RemovalCause.EXPLICIT
        self._removals[cause] += 1
        if (hook := self.on_removal) is not None:
            hook(entry.key, cause)

    def _reweigh(self, entry: Entry, weight: int) -> None:
        """Note the weight of an entry's new value, and make room if it grew."""
        assert isinstance(entry, WeighedEntry)
        self._weight += weight - entry.weight
        entry.weight = weight
        if self._max_bytes is not None and self._weight > self._max_bytes:
            # Out of the policy while room is made, so that it is not the victim of its own growth.
            self._policy.forget(entry)
            self._make_room(0, 0)
            self._policy.admit(entry)

    def _make_room(self, entries: int, weight: int) -> None:
        """Give up entries until so many more, and so much more weight, fit in."""
        most, heaviest = self._max_entries, self._max_bytes
        while (most is not None and len(self._entries) + entries > most) or (
            heaviest is not None and self._weight + weight > heaviest and len(self._policy)
        ):
            self._unlist(self._policy.evict(), RemovalCause.SIZE)
            self._tidy()

    def _drop(self, entry: Entry, cause: RemovalCause) -> None:
        self._changing = entry.key
        self._policy.forget(entry)
        self._unlist(entry, cause)
        self._tidy()
        self._changing = None

    def _tidy(self) -> None:
        """Rid the wheel of leftovers when they have become too many."""
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
            entry.expires_at = GONE
        entry.value = None  # The wheel may keep the entry for a while, never the value.
        if (hook := self.on_removal) is not None:
            hook(entry.key, cause)

    def _drop_all(self) -> None:
        self._changing = ""
        dropped = list(self._entries.values())
        self._entries.clear()
        # The entries link to each other, so only the garbage collector frees them. Their values go at once.
        for entry in dropped:
            entry.value = None
        self._policy.clear()
        self._wheel.clear()
        self._tags.clear()
        self._metadata_of.clear()
        self._weight = 0
        self._changing = None

    def _repair_entries(self) -> None:
        """Rebuild from the entries whatever an interrupted turn left half done. An entry that was being written goes."""
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
        # The wheel looks again when the entry's present slot comes up, so only an earlier end needs a new place.
        sooner = expires_at < entry.expires_at
        entry.expires_at = expires_at
        if sooner:
            self._wheel.schedule(entry, now)
            self._tidy()

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
            said: Any = self._weigher(value)
            weight = said + ENTRY_OVERHEAD
        except Exception as error:
            if is_interruption(error):
                raise
            raise CacheSerializationError(
                f"the weigher failed on a value of type {type(value).__name__}: {type(error).__name__}"
            ) from error
        if not isinstance(weight, int) or weight < ENTRY_OVERHEAD:
            raise CacheSerializationError(f"the weigher must return bytes as an int, 0 or more, not {said!r}")
        if weight > self._max_bytes:
            raise CacheCapacityError("value is larger than the whole memory store", weight, self._max_bytes)
        return int(weight)

    # Telling

    def announce_due(self, when: float) -> None:
        """Report a next expiry that has become an earlier one."""
        if (hook := self.on_due) is not None:
            hook(when)

    def _tell_write(self, entry: Entry, now: float) -> None:
        if (hook := self.on_write) is not None:
            left = entry.expires_at - now
            hook(entry.key, entry.version, left if left < NEVER else None, entry.tags)
