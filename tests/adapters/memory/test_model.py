"""The memory store against a model that says at any time what it holds, with time under the test's control.

The model learns of evictions from the store's own listener, so it is exact for a bounded store too: what may be read,
what each removal is counted as, and that it is told once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cachebus.adapters.memory.entries import ENTRY_OVERHEAD
from cachebus.adapters.memory.expiry_wheel import RESOLUTION
from cachebus.adapters.memory.store import MemoryStore
from cachebus.messages import (
    Add,
    CacheCapacityError,
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
    Increment,
    Incremented,
    InvalidateTags,
    Missing,
    NotStored,
    Present,
    RemovalCause,
    Reply,
    Request,
    Scan,
    Scanned,
    Set,
    SetMany,
    Stored,
    StoredMany,
    Touch,
    Ttl,
    WrongType,
)

from ...clock import ManualClock

NEVER = math.inf
TOO_BIG = "x" * 40
MAX_BYTES = 8 * ENTRY_OVERHEAD

KEYS = ("a", "b", "ab", "ba", "c:1", "c:2", "c:3", "ü*")
PATTERNS: dict[str, Callable[[str], bool]] = {
    "*": lambda key: True,
    "a*": lambda key: key.startswith("a"),
    "?": lambda key: len(key) == 1,
    "c:[12]": lambda key: key in ("c:1", "c:2"),
    "[^a]*": lambda key: not key.startswith("a"),
    r"?\*": lambda key: key == "ü*",
    "nothing": lambda key: False,
}

keys = st.sampled_from(KEYS)
some_keys = st.lists(keys, max_size=5).map(tuple)
values = st.one_of(st.integers(-3, 3), st.text("xyz", max_size=3), st.none(), st.just(TOO_BIG))
tag_sets = st.lists(st.sampled_from(("red", "green", "blue")), unique=True, max_size=2).map(tuple)
times = st.sampled_from((0.001, 0.05, RESOLUTION, 1.0, 6.4, 6.5, 64.0, 409.6, 30_000.0)) | st.floats(0.01, 500.0)
ttls = st.sampled_from(("default", None, 1e12)) | times


@dataclass
class Value:
    """One value that the store holds. It stays here when it has become unreadable, until the store lets go of it."""

    value: Any
    expires_at: float
    tags: tuple[str, ...]
    version: float = 0.0
    invalidated: bool = False


def weigh(value: Any) -> int:
    return 60 * len(str(value))


class MemoryStoreMachine(RuleBasedStateMachine):
    """Every verb of the store, in any order."""

    policy = "lru"

    def set_up(self, default_ttl: float | None, max_entries: int | None = None, max_bytes: int | None = None) -> None:
        # A whole multiple of the wheel's slots, where rounding bites.
        self.clock = ManualClock(monotonic=128.0)
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.default_ttl = default_ttl
        self.store = MemoryStore(
            max_entries=max_entries,
            max_bytes=max_bytes,
            default_ttl=default_ttl,
            policy=self.policy,
            weigher=weigh,
            clock=self.clock,
        )
        self.store.on_read = self.has_read
        self.store.on_write = self.has_written
        self.store.on_removal = self.has_removed
        self.held: dict[str, Value] = {}
        self.pending: dict[str, Value] = {}
        self.doomed: set[str] = set()
        self.last_version = 0.0
        self.reads: Counter[bool] = Counter()
        self.told: Counter[RemovalCause] = Counter()
        self.cleared = 0

    # What the store tells

    def has_read(self, key: str, hit: bool) -> None:
        self.reads[hit] += 1
        assert hit == (key in self.live())

    def has_written(self, key: str, version: float, ttl: float | None, tags: tuple[str, ...]) -> None:
        written = self.pending.pop(key)
        assert version > self.last_version, "versions only grow"
        assert key not in self.held, "a value that was there has been told as removed"
        assert tags == written.tags
        assert (math.inf if ttl is None else ttl) == written.expires_at - self.now
        self.last_version = written.version = version
        self.held[key] = written

    def has_removed(self, key: str, cause: RemovalCause) -> None:
        self.told[cause] += 1
        gone = self.held.pop(key)  # A KeyError here is a removal told twice.
        expired = gone.expires_at <= self.now
        match cause:
            case RemovalCause.EXPIRED:
                assert expired
            case RemovalCause.EXPLICIT:
                assert not expired
                assert gone.invalidated or key in self.doomed
            case RemovalCause.REPLACED:
                assert not expired
                assert not gone.invalidated
                assert key in self.pending
            case RemovalCause.SIZE:
                assert self.max_entries or self.max_bytes
                assert self.pending.keys() != {key}, "the value being written is not the victim"

    # The model

    @property
    def now(self) -> float:
        return self.clock.monotonic()

    def live(self) -> dict[str, Value]:
        return {key: value for key, value in self.held.items() if value.expires_at > self.now and not value.invalidated}

    def ask(self, request: Request[Any]) -> Reply:
        verb = self.store.verb(type(request))
        assert verb is not None
        return verb(request)

    def expiry(self, ttl: Ttl) -> float:
        if ttl == "default":
            ttl = self.default_ttl
        return NEVER if ttl is None else self.now + ttl

    def write(self, request: Request[Any], written: dict[str, Any], ttl: Ttl, tags: tuple[str, ...]) -> Reply | None:
        """Ask for a write that will take place, unless a value is too big; then `None`, and nothing has changed."""
        self.pending = {key: Value(value, self.expiry(ttl), tags) for key, value in written.items()}
        if self.max_bytes is not None and any(
            weigh(value) + ENTRY_OVERHEAD > self.max_bytes for value in written.values()
        ):
            before = dict(self.held)
            with pytest.raises(CacheCapacityError, match="larger than the memory store"):
                self.ask(request)
            live = {key for key, value in before.items() if value.expires_at > self.now and not value.invalidated}
            assert live <= set(self.held), "what cannot be stored takes nothing's place"
            self.pending = {}
            return None
        reply = self.ask(request)
        assert not self.pending
        return reply

    def check_found(self, key: str, reply: Reply) -> None:
        expected = self.live().get(key)
        if expected is None:
            assert reply == Missing()
            return
        assert isinstance(reply, Found)
        assert reply.value == expected.value
        assert reply.version == reply.stored_at == expected.version
        assert reply.tags == expected.tags
        assert reply.ttl == (None if expected.expires_at == NEVER else expected.expires_at - self.now)

    def check_stored(self, key: str, reply: Reply | None) -> None:
        assert reply is None or reply == Stored(self.held[key].version)

    # Reading

    @rule(key=keys)
    def get(self, key: str) -> None:
        self.check_found(key, self.ask(Get(key)))

    @rule(wanted=some_keys)
    def get_many(self, wanted: tuple[str, ...]) -> None:
        reply = self.ask(GetMany(wanted))
        assert isinstance(reply, FoundMany)
        assert set(reply.entries) == set(wanted) & set(self.live())
        for key, found in reply.entries.items():
            self.check_found(key, found)

    @rule(key=keys)
    def exists(self, key: str) -> None:
        reply = self.ask(Exists(key))
        self.check_present(key, reply)

    def check_present(self, key: str, reply: Reply) -> None:
        expected = self.live().get(key)
        if expected is None:
            assert reply == Missing()
        else:
            left = None if expected.expires_at == NEVER else expected.expires_at - self.now
            assert reply == Present(expected.version, left)

    @rule(pattern=st.sampled_from(tuple(PATTERNS)))
    def scan(self, pattern: str) -> None:
        reply = self.ask(Scan(pattern))
        assert isinstance(reply, Scanned)
        assert reply.cursor == ""
        assert sorted(reply.keys) == sorted(filter(PATTERNS[pattern], self.live()))

    # Writing

    @rule(key=keys, value=values, ttl=ttls, tags=tag_sets)
    def set(self, key: str, value: Any, ttl: Ttl, tags: tuple[str, ...]) -> None:
        self.check_stored(key, self.write(Set(key, value, ttl, tags), {key: value}, ttl, tags))

    @rule(key=keys, value=values, ttl=ttls, tags=tag_sets, only_if=st.sampled_from(("absent", "present")))
    def set_on_condition(self, key: str, value: Any, ttl: Ttl, tags: tuple[str, ...], only_if: Any) -> None:
        there = self.live().get(key)
        request = Set(key, value, ttl, tags, only_if)
        if (there is None) == (only_if == "absent"):
            self.check_stored(key, self.write(request, {key: value}, ttl, tags))
        else:
            assert self.ask(request) == NotStored(0.0 if there is None else there.version)

    @rule(key=keys, value=values, ttl=ttls, tags=tag_sets)
    def add(self, key: str, value: Any, ttl: Ttl, tags: tuple[str, ...]) -> None:
        there = self.live().get(key)
        if there is None:
            self.check_stored(key, self.write(Add(key, value, ttl, tags), {key: value}, ttl, tags))
        else:
            assert self.ask(Add(key, value, ttl, tags)) == NotStored(there.version)

    @rule(items=st.dictionaries(keys, values, max_size=5), ttl=ttls, tags=tag_sets)
    def set_many(self, items: dict[str, Any], ttl: Ttl, tags: tuple[str, ...]) -> None:
        before = dict(self.held)
        reply = self.write(SetMany(items, ttl, tags), items, ttl, tags)
        assert reply in (None, StoredMany(len(items)))
        if reply is None:
            assert self.held == before, "all of them or none"

    @rule(key=keys, value=values, ttl=ttls, tags=tag_sets, stale=st.booleans())
    def compare_and_set(self, key: str, value: Any, ttl: Ttl, tags: tuple[str, ...], stale: bool) -> None:
        there = self.live().get(key)
        if there is not None and not stale:
            request = CompareAndSet(key, value, there.version, ttl, tags)
            self.check_stored(key, self.write(request, {key: value}, ttl, tags))
        else:
            version = 0.0 if there is None else there.version
            assert self.ask(CompareAndSet(key, value, 1.0, ttl, tags)) == NotStored(version)

    @rule(key=keys, ttl=ttls)
    def touch(self, key: str, ttl: Ttl) -> None:
        if (there := self.live().get(key)) is not None:
            there.expires_at = self.expiry(ttl)
        self.check_present(key, self.ask(Touch(key, ttl)))

    @rule(key=keys, delta=st.sampled_from((1, -2, 2**63)), initial=st.sampled_from((0, 5, None)), ttl=ttls)
    def increment(self, key: str, delta: int, initial: int | None, ttl: Ttl) -> None:
        there = self.live().get(key)
        request = Increment(key, delta, initial, ttl)
        start = initial if there is None else there.value
        if there is None and initial is None:
            assert self.ask(request) == Missing()
        elif type(start) is not int or not -(2**63) <= start + delta < 2**63:
            with pytest.raises(WrongType):
                self.ask(request)
        elif there is None:
            assert self.write(request, {key: start + delta}, ttl, ()) == Incremented(start + delta)
        else:
            self.pending = {key: Value(start + delta, there.expires_at, there.tags)}
            assert self.ask(request) == Incremented(start + delta)

    # Removing

    @rule(key=keys)
    def delete(self, key: str) -> None:
        self.doomed = {key} & set(self.live())
        assert self.ask(Delete(key)) == Deleted(len(self.doomed))
        self.doomed = set()

    @rule(wanted=some_keys)
    def delete_many(self, wanted: tuple[str, ...]) -> None:
        self.doomed = set(wanted) & set(self.live())
        assert self.ask(DeleteMany(wanted)) == Deleted(len(self.doomed))
        assert not self.doomed & set(self.held)
        self.doomed = set()

    @rule(pattern=st.sampled_from(tuple(PATTERNS)))
    def delete_pattern(self, pattern: str) -> None:
        self.doomed = set(filter(PATTERNS[pattern], self.live()))
        assert self.ask(DeletePattern(pattern)) == Deleted(len(self.doomed))
        assert not self.doomed & set(self.held)
        self.doomed = set()

    @rule(tags=tag_sets)
    def invalidate_tags(self, tags: tuple[str, ...]) -> None:
        self.ask(InvalidateTags(tags))
        for value in self.held.values():
            value.invalidated = value.invalidated or not set(tags).isdisjoint(value.tags)

    @rule()
    def clear(self) -> None:
        assert self.ask(Clear()) == Cleared()
        self.cleared += len(self.held)
        self.held = {}

    # Time

    @rule(seconds=times)
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @precondition(lambda self: self.store.next_expiry() is not None)
    @rule()
    def advance_to_the_next_expiry(self) -> None:
        due = self.store.next_expiry()
        assert due is not None
        if due > self.now:
            self.clock.advance(due - self.now)

    @rule(limit=st.sampled_from((1, 2, 1000)))
    def sweep(self, limit: int) -> None:
        told = self.told[RemovalCause.EXPIRED]
        swept = self.store.sweep(limit)
        assert swept == self.told[RemovalCause.EXPIRED] - told <= limit
        due = self.store.next_expiry()
        if due is None or due > self.now:
            overdue = [key for key, value in self.held.items() if value.expires_at + RESOLUTION < self.now]
            assert not overdue, "whatever has expired is gone after a sweep"
        else:
            assert limit < 1000, "it asks for another sweep if it was not allowed to finish"

    # What always holds

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        assert {key: entry.value for key, entry in self.store._entries.items()} == {
            key: value.value for key, value in self.held.items()
        }

    @invariant()
    def counters_agree_with_what_was_told(self) -> None:
        gauges = self.store.gauges()
        expected = dict.fromkeys(RemovalCause, 0) | self.told
        expected[RemovalCause.EXPLICIT] += self.cleared
        assert gauges.removals == expected
        assert (gauges.hits, gauges.misses) == (self.reads[True], self.reads[False])
        assert gauges.entries == len(self.store) == len(self.held)

    @invariant()
    def the_bounds_hold(self) -> None:
        gauges = self.store.gauges()
        if self.max_entries is not None:
            assert gauges.entries <= self.max_entries
        if self.max_bytes is not None:
            assert gauges.weight <= self.max_bytes
            assert gauges.weight == sum(weigh(value.value) + ENTRY_OVERHEAD for value in self.held.values())

    @invariant()
    def the_parts_agree(self) -> None:
        store = self.store
        assert len(store._policy) == len(store._entries)
        carried = Counter(tag for entry in store._entries.values() for tag in entry.tags)
        assert {tag: record[0] for tag, record in store._tags._tags.items()} == carried

    @invariant()
    def the_wheel_knows_every_entry_that_expires_and_few_others(self) -> None:
        wheel = self.store._wheel
        places: dict[int, float] = {}
        for due, slot in wheel._slots.items():
            for entry in slot:
                places[id(entry)] = min(due, places.get(id(entry), NEVER))
        for entry in self.store._entries.values():
            if entry.expires_at != NEVER:
                assert places[id(entry)] <= max(entry.expires_at, self.now) + RESOLUTION * 1.001
        assert sorted(wheel._heap) == sorted(wheel._slots)
        assert wheel._references == sum(map(len, wheel._slots.values()))
        assert wheel._references <= 2 * len(self.store) + 64


class Unbounded(MemoryStoreMachine):
    @initialize(default_ttl=st.sampled_from((None, 30.0)))
    def begin(self, default_ttl: float | None) -> None:
        self.set_up(default_ttl)


class Bounded(MemoryStoreMachine):
    @initialize(max_entries=st.sampled_from((1, 2, 4, None)), max_bytes=st.sampled_from((None, MAX_BYTES)))
    def begin(self, max_entries: int | None, max_bytes: int | None) -> None:
        self.set_up(None, max_entries or (None if max_bytes else 3), max_bytes)


class BoundedS3Fifo(Bounded):
    policy = "s3fifo"


class BoundedLru(Bounded):
    policy = "lru"


class BoundedLfu(Bounded):
    policy = "lfu"


class BoundedSieve(Bounded):
    policy = "sieve"


_profile = settings(max_examples=60, stateful_step_count=50, deadline=None)

TestAnUnboundedStoreDoesWhatTheModelDoes = Unbounded.TestCase
TestAnUnboundedStoreDoesWhatTheModelDoes.settings = _profile
TestAStoreUnderS3FifoDoesWhatTheModelDoes = BoundedS3Fifo.TestCase
TestAStoreUnderS3FifoDoesWhatTheModelDoes.settings = _profile
TestAStoreUnderLruDoesWhatTheModelDoes = BoundedLru.TestCase
TestAStoreUnderLruDoesWhatTheModelDoes.settings = _profile
TestAStoreUnderLfuDoesWhatTheModelDoes = BoundedLfu.TestCase
TestAStoreUnderLfuDoesWhatTheModelDoes.settings = _profile
TestAStoreUnderSieveDoesWhatTheModelDoes = BoundedSieve.TestCase
TestAStoreUnderSieveDoesWhatTheModelDoes.settings = _profile
