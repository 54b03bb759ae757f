"""The memory store: times to live, bounds, weights, versions, and what happens to values that go."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest

from cachebus import Subscription, open_cache, open_sync_cache
from cachebus.adapters.memory.entries import ENTRY_OVERHEAD
from cachebus.adapters.memory.expiry_wheel import RESOLUTION
from cachebus.adapters.memory.store import MemoryStore
from cachebus.messages import (
    Add,
    BadMessage,
    CacheCapacityError,
    CacheError,
    CacheExpired,
    CacheSerializationError,
    Clear,
    CompareAndSet,
    Delete,
    DeletePattern,
    Found,
    Get,
    GetMany,
    Increment,
    Incremented,
    Missing,
    Ping,
    RemovalCause,
    Set,
    SetMany,
    Stored,
    Touch,
    WrongType,
)
from cachebus.settings import load_settings

from ...clock import ManualClock

POLICIES = ("s3fifo", "lru", "lfu", "sieve")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> MemoryStore:
    return MemoryStore(max_entries=None, clock=clock)


def value_of(store: MemoryStore, key: str) -> Any:
    reply = store.get(Get(key))
    return reply.value if isinstance(reply, Found) else Missing


def found(store: MemoryStore, key: str) -> Found:
    reply = store.get(Get(key))
    assert isinstance(reply, Found)
    return reply


async def next_key(events: Subscription) -> str:
    event: Any = await anext(events)
    return str(event.key)


def ttl_of(store: MemoryStore, key: str) -> float | None:
    return found(store, key).ttl


def readable(store: MemoryStore, *keys: str) -> list[str]:
    return list(store.get_many(GetMany(keys)).entries)


# Times to live


def test_a_value_is_readable_until_its_time_is_up_and_not_at_that_instant(
    store: MemoryStore, clock: ManualClock
) -> None:
    store.set(Set("key", 1, ttl=10.0))
    clock.advance(9.999)
    assert value_of(store, "key") == 1
    clock.advance(0.001)
    assert value_of(store, "key") is Missing


@pytest.mark.parametrize("ttl", [1e-6, 0.001, 0.25])
def test_times_below_a_second_are_kept_to(store: MemoryStore, clock: ManualClock, ttl: float) -> None:
    store.set(Set("key", 1, ttl=ttl))
    clock.advance(ttl * 0.9)
    assert value_of(store, "key") == 1
    clock.advance(ttl * 0.2)
    assert value_of(store, "key") is Missing


def test_a_ttl_left_out_is_that_of_the_store(clock: ManualClock) -> None:
    store = MemoryStore(default_ttl=5.0, clock=clock)
    store.set(Set("default", 1))
    store.set(Set("own", 1, ttl=7.0))
    store.set(Set("none", 1, ttl=None))
    store.increment(Increment("counter"))
    assert [ttl_of(store, key) for key in ("default", "own", "none", "counter")] == [5.0, 7.0, None, 5.0]


def test_a_store_without_a_default_keeps_values_for_ever(store: MemoryStore, clock: ManualClock) -> None:
    store.set(Set("key", 1))
    clock.advance(1e12)
    assert ttl_of(store, "key") is None


def test_an_overwritten_value_has_the_ttl_of_the_new_one(store: MemoryStore, clock: ManualClock) -> None:
    for old, new in ((10.0, 5.0), (5.0, 10.0), (None, 10.0), (10.0, None)):
        store.set(Set("key", "old", ttl=old))
        clock.advance(1.0)
        store.set(Set("key", "new", ttl=new))
        assert ttl_of(store, "key") == new


@pytest.mark.parametrize(
    "write",
    [
        lambda store, version: store.set_many(SetMany({"key": 2})),
        lambda store, version: store.set(Set("key", 2, only_if="present")),
        lambda store, version: store.compare_and_set(CompareAndSet("key", 2, version)),
    ],
    ids=["set_many", "only_if", "compare_and_set"],
)
def test_an_overwritten_value_loses_its_ttl_to_the_default_one(
    clock: ManualClock, write: Callable[[MemoryStore, float], object]
) -> None:
    store = MemoryStore(clock=clock)
    stored = store.set(Set("key", 1, ttl=5.0))
    write(store, stored.version)
    clock.advance(100.0)
    assert value_of(store, "key") == 2


def test_an_incremented_value_keeps_its_ttl(store: MemoryStore, clock: ManualClock) -> None:
    store.set(Set("n", 1, ttl=10.0))
    clock.advance(4.0)
    store.increment(Increment("n", ttl=100.0))
    assert ttl_of(store, "n") == 6.0
    clock.advance(6.0)
    assert value_of(store, "n") is Missing


def test_touch_counts_from_now_earlier_or_later(store: MemoryStore, clock: ManualClock) -> None:
    store.set(Set("key", 1, ttl=10.0))
    clock.advance(1.0)
    store.touch(Touch("key", 2.0))
    assert ttl_of(store, "key") == 2.0
    store.touch(Touch("key", 50.0))
    clock.advance(49.0)
    assert value_of(store, "key") == 1
    store.touch(Touch("key", None))
    assert ttl_of(store, "key") is None
    store.touch(Touch("key", 3.0))
    clock.advance(3.0)
    assert value_of(store, "key") is Missing


def test_touch_with_the_default_takes_the_stores(clock: ManualClock) -> None:
    store = MemoryStore(default_ttl=9.0, clock=clock)
    store.set(Set("key", 1, ttl=1.0))
    store.touch(Touch("key"))
    assert ttl_of(store, "key") == 9.0


def test_touch_changes_neither_value_nor_version(store: MemoryStore, clock: ManualClock) -> None:
    stored = store.set(Set("key", 1, ttl=10.0))
    assert isinstance(stored, Stored)
    clock.advance(1.0)
    store.touch(Touch("key", 20.0))
    found = store.get(Get("key"))
    assert isinstance(found, Found)
    assert found.version == found.stored_at == stored.version


def test_an_expired_value_is_as_if_it_were_not_there(store: MemoryStore, clock: ManualClock) -> None:
    for key in "abcdef":
        store.set(Set(key, 1, ttl=1.0))
    clock.advance(1.0)
    assert isinstance(store.add(Add("a", 2)), Stored)
    assert isinstance(store.set(Set("b", 2, only_if="absent")), Stored)
    assert store.increment(Increment("c", initial=10)) == Incremented(11)
    assert store.touch(Touch("d")) == Missing()
    assert store.delete(Delete("e")).count == 0
    assert store.delete_pattern(DeletePattern("f")).count == 0


@pytest.mark.parametrize("ttl", [0.0, -1.0, math.nan, 0, -5])
def test_a_ttl_that_is_not_positive_is_refused_and_changes_nothing(store: MemoryStore, ttl: float) -> None:
    store.set(Set("key", "old", ttl=10.0))
    requests = [
        Set("key", 2, ttl),
        SetMany({"key": 2}, ttl),
        Touch("key", ttl),
        Add("new", 2, ttl),
        Increment("n", ttl=ttl),
    ]
    for request in requests:
        verb = store.verb(type(request))
        assert verb is not None
        with pytest.raises(BadMessage, match="ttl must be a positive, finite number of seconds"):
            verb(request)
    assert value_of(store, "key") == "old"
    assert ttl_of(store, "key") == 10.0
    assert readable(store, "new", "n") == []


def test_the_wall_clock_decides_nothing() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    store.set(Set("key", 1, ttl=10.0))
    wall = clock.wall
    for jump in (3600.0, -7200.0, 31_536_000.0):
        clock.wall = lambda jump=jump: wall() + jump  # type: ignore[misc]
        assert ttl_of(store, "key") == 10.0
    clock.advance(10.0)
    assert value_of(store, "key") is Missing


# Expiry without being asked


@pytest.fixture(scope="module", autouse=True)
def settings_are_imported() -> None:
    """Importing them blocks, so it is not done first on an event loop."""
    load_settings("memory://")


async def test_what_has_expired_goes_without_being_asked(clock: ManualClock) -> None:
    async with open_cache("memory://", clock=clock) as cache:
        await cache.set("short", 1, ttl=1.0)
        await cache.set("shorter", 1, ttl=0.5)
        await cache.set("long", 1, ttl=1_000.0)
        await cache.set("for ever", 1)
        async with cache.events(CacheExpired) as events:
            clock.advance(0.5 + RESOLUTION)
            assert await next_key(events) == "shorter"
            clock.advance(0.5)
            assert await next_key(events) == "short"
        assert (await cache.statistics()).entries == 2
        assert (await cache.statistics()).removals["expired"] == 2


async def test_a_later_entry_that_ends_earlier_is_not_waited_for_too_long(clock: ManualClock) -> None:
    async with open_cache("memory://", clock=clock) as cache, cache.events(CacheExpired) as events:
        await cache.set("late", 1, ttl=500.0)
        await cache.set("soon", 1, ttl=1.0)
        await cache.set("touched", 1, ttl=500.0)
        await cache.touch("touched", ttl=2.0)
        clock.advance(1.0 + RESOLUTION)
        assert await next_key(events) == "soon"
        clock.advance(1.0)
        assert await next_key(events) == "touched"


async def test_more_expires_at_once_than_one_turn_sweeps(clock: ManualClock) -> None:
    async with (
        open_cache("memory://?max_entries=none", clock=clock) as cache,
        cache.events(CacheExpired, capacity=5_000) as events,
    ):
        await cache.set_many({f"k{number}": number for number in range(3_500)}, ttl=1.0)
        clock.advance(2.0)
        gone = {await next_key(events) for _ in range(3_500)}
        assert len(gone) == 3_500
        assert (await cache.statistics()).entries == 0


def slots_due(store: MemoryStore, now: float) -> int:
    """How many entries a sweep would look at."""
    return sum(len(slot) for due, slot in store._wheel._slots.items() if due <= now)


def test_a_sweep_looks_at_what_is_due_and_not_at_100_000_others(store: MemoryStore, clock: ManualClock) -> None:
    for number in range(100_000):
        store.set(Set(f"late {number}", number, ttl=1_000.0 + number / 100))
    for number in range(10):
        store.set(Set(f"soon {number}", number, ttl=1.0))
    clock.advance(1.0 + RESOLUTION)
    assert slots_due(store, clock.monotonic()) == 10
    assert store.sweep(1_000) == 10
    assert len(store) == 100_000


def test_over_its_whole_life_an_entry_is_looked_at_a_handful_of_times(store: MemoryStore, clock: ManualClock) -> None:
    entries = 20_000
    for number in range(entries):
        store.set(Set(f"k{number}", number, ttl=100.0 + number / 2))
    looks = 0
    while (due := store.next_expiry()) is not None:
        clock.advance(max(0.0, due - clock.monotonic()))
        looks += slots_due(store, clock.monotonic())
        store.sweep(entries)
    assert len(store) == 0
    assert looks <= 4 * entries


def test_values_are_let_go_of_when_they_expire_though_nobody_asks(store: MemoryStore, clock: ManualClock) -> None:
    value = Thing()
    gone = weakref.ref(value)
    store.set(Set("key", value, ttl=1.0))
    del value
    clock.advance(2.0)
    assert gone() is not None
    assert store.sweep(10) == 1
    assert gone() is None


@pytest.mark.parametrize("again", ["overwrite", "touch", "delete"])
def test_the_wheel_stays_small_however_often_times_change(store: MemoryStore, clock: ManualClock, again: str) -> None:
    for round_ in range(20_000):
        key, ttl = f"k{round_ % 50}", 1_000.0 - (round_ % 977) + (round_ % 13) * 100
        if again == "touch" and key in store._entries:
            store.touch(Touch(key, ttl))
        else:
            store.set(Set(key, round_, ttl=ttl))
        if again == "delete":
            store.delete(Delete(key))
        assert store._wheel._references <= 2 * 50 + 64
    clock.advance(1e6)
    store.sweep(100_000)
    assert len(store) == 0
    assert store._wheel._references == 0


def test_the_wheel_shrinks_with_the_store(store: MemoryStore) -> None:
    for number in range(10_000):
        store.set(Set(f"k{number}", number, ttl=3_600.0))
    store.delete_pattern(DeletePattern("k*"))
    assert store._wheel._references <= 64


def test_one_large_value_in_the_place_of_many_leaves_nothing_in_the_wheel(clock: ManualClock) -> None:
    store = MemoryStore(max_entries=None, max_bytes=1_000 * (ENTRY_OVERHEAD + 10), weigher=len, clock=clock)
    for number in range(1_000):
        store.set(Set(f"k{number}", "0123456789", ttl=3_600.0))
    store.set(Set("large", "x" * 999 * (ENTRY_OVERHEAD + 10)))
    assert len(store) <= 2
    assert store._wheel._references <= 2 * 2 + 64


# Bounds


@pytest.mark.parametrize("policy", POLICIES)
def test_no_more_entries_are_kept_than_the_bound(clock: ManualClock, policy: str) -> None:
    store = MemoryStore(max_entries=10, policy=policy, clock=clock)
    for number in range(100):
        store.set(Set(f"k{number}", number))
        assert value_of(store, f"k{number}") == number, "what was just set is there"
        assert len(store) <= 10
    assert store.gauges().removals[RemovalCause.SIZE] == 90


def test_the_least_recently_used_entry_goes_first_under_lru(clock: ManualClock) -> None:
    store = MemoryStore(max_entries=3, policy="lru", clock=clock)
    gone: list[tuple[str, RemovalCause]] = []
    store.on_removal = lambda key, cause: gone.append((key, cause))
    for key in "abc":
        store.set(Set(key, key))
    store.get(Get("a"))
    store.set(Set("d", "d"))
    store.touch(Touch("c"))
    store.set(Set("e", "e"))
    assert gone == [("b", RemovalCause.SIZE), ("a", RemovalCause.SIZE)]
    assert readable(store, *"abcde") == ["c", "d", "e"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_hot_key_outlives_a_scan(clock: ManualClock, policy: str) -> None:
    store = MemoryStore(max_entries=100, policy=policy, clock=clock)
    store.set(Set("hot", 1))
    for number in range(5_000):
        store.get(Get("hot"))
        store.set(Set(f"scan {number}", number))
    assert value_of(store, "hot") == 1


def test_weights_add_up_to_the_bound_in_bytes(clock: ManualClock) -> None:
    each = ENTRY_OVERHEAD + 50
    store = MemoryStore(max_entries=None, max_bytes=3 * each, weigher=len, policy="lru", clock=clock)
    for key in "abc":
        store.set(Set(key, "x" * 50))
    assert store.gauges().weight == 3 * each
    store.set(Set("d", "x" * 50))
    assert readable(store, *"abcd") == ["b", "c", "d"]
    store.delete(Delete("b"))
    assert store.gauges().weight == 2 * each
    store.clear(Clear())
    assert store.gauges().weight == 0


def test_a_value_that_grows_pushes_others_out_and_never_itself(clock: ManualClock) -> None:
    each = ENTRY_OVERHEAD + 50
    store = MemoryStore(max_entries=None, max_bytes=3 * each, weigher=len, policy="lru", clock=clock)
    for key in "abc":
        store.set(Set(key, "x" * 50))
    store.set(Set("a", "x" * (each + 50)))
    assert readable(store, *"abc") == ["a", "c"]
    store.set(Set("a", "x" * (3 * each - ENTRY_OVERHEAD)))
    assert readable(store, *"abc") == ["a"]
    assert store.gauges().weight == store.gauges().max_bytes == 3 * each
    store.set(Set("a", "x"))
    assert store.gauges().weight == ENTRY_OVERHEAD + 1


@pytest.mark.parametrize("policy", POLICIES)
def test_a_counter_that_grows_stays(clock: ManualClock, policy: str) -> None:
    store = MemoryStore(
        max_entries=None, max_bytes=2 * ENTRY_OVERHEAD + 9, weigher=lambda v: len(str(v)), policy=policy, clock=clock
    )
    store.set(Set("n", 9))
    store.set(Set("other", "x" * 8))
    store.increment(Increment("n", 1))
    assert value_of(store, "n") == 10
    assert value_of(store, "other") is Missing


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_the_bound_itself_fits_and_a_byte_more_does_not(clock: ManualClock, over: int) -> None:
    limit = 1_000
    store = MemoryStore(max_bytes=limit, weigher=len, clock=clock)
    value = "x" * (limit - ENTRY_OVERHEAD + over)
    if over <= 0:
        store.set(Set("key", value))
        assert value_of(store, "key") is value
        return
    with pytest.raises(CacheCapacityError, match=r"1,001 bytes, the limit is 1,000 bytes") as caught:
        store.set(Set("key", value))
    assert (caught.value.size, caught.value.limit) == (1_001, 1_000)


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.set(Set("key", "x" * 2_000)),
        lambda store: store.set_many(SetMany({"other": "x", "key": "x" * 2_000})),
        lambda store: store.set(Set("key", "x" * 2_000, only_if="present")),
    ],
    ids=["set", "set_many", "only_if"],
)
def test_what_is_too_large_leaves_everything_as_it_was(
    clock: ManualClock, write: Callable[[MemoryStore], object]
) -> None:
    store = MemoryStore(max_bytes=1_000, weigher=len, clock=clock)
    store.set(Set("key", "old", ttl=10.0, tags=("tag",)))
    before = store.get(Get("key"))
    gauges = store.gauges()
    with pytest.raises(CacheCapacityError):
        write(store)
    assert store.gauges() == gauges
    assert store.get(Get("key")) == before
    assert value_of(store, "other") is Missing


def explode(value: Any) -> int:
    if value == "bad":
        raise RuntimeError("no idea")
    return 1


@pytest.mark.parametrize(
    "weigher",
    [
        explode,
        lambda value: -1 if value == "bad" else 1,
        lambda value: math.nan if value == "bad" else 1,
        lambda value: 1.5 if value == "bad" else 1,
        lambda value: "1" if value == "bad" else 1,
        lambda value: None if value == "bad" else 1,
    ],
    ids=["raises", "negative", "NaN", "float", "str", "None"],
)
def test_a_weigher_that_fails_is_an_error_and_the_old_value_stays(
    clock: ManualClock, weigher: Callable[[Any], Any]
) -> None:
    store = MemoryStore(max_bytes=10_000, weigher=weigher, clock=clock)
    store.set(Set("key", "old"))
    with pytest.raises(CacheSerializationError, match="weigher"):
        store.set(Set("key", "bad"))
    with pytest.raises(CacheSerializationError, match="weigher"):
        store.set_many(SetMany({"fine": 1, "key": "bad"}))
    assert value_of(store, "key") == "old"
    assert store.gauges().weight == ENTRY_OVERHEAD + 1
    assert len(store) == 1


def test_a_weigher_is_not_asked_where_no_bytes_are_bounded(clock: ManualClock) -> None:
    store = MemoryStore(weigher=explode, clock=clock)
    store.set(Set("key", "bad"))
    assert value_of(store, "key") == "bad"


# Versions


def test_versions_grow_though_the_clock_stands_still(store: MemoryStore) -> None:
    versions = [store.set(Set(key, 1)).version for key in "abcabcabc" * 100]
    store.increment(Increment("n"))
    versions.append(found(store, "n").version)
    assert versions == sorted(set(versions))


def test_versions_grow_from_one_life_of_the_store_to_the_next(clock: ManualClock) -> None:
    first = MemoryStore(clock=clock)
    old = first.set(Set("key", 1)).version
    clock.advance(0.001)
    assert MemoryStore(clock=clock).set(Set("key", 1)).version > old


def test_a_version_is_lost_with_any_other_write(store: MemoryStore) -> None:
    version = store.set(Set("key", 1)).version
    store.set(Set("key", 1))
    assert not isinstance(store.compare_and_set(CompareAndSet("key", 2, version)), Stored)
    version = found(store, "key").version
    store.increment(Increment("key"))
    assert not isinstance(store.compare_and_set(CompareAndSet("key", 2, version)), Stored)
    version = found(store, "key").version
    store.delete(Delete("key"))
    store.set(Set("key", 1))
    assert not isinstance(store.compare_and_set(CompareAndSet("key", 2, version)), Stored)


def test_stored_at_is_the_unix_time_of_the_write(store: MemoryStore, clock: ManualClock) -> None:
    for _ in range(3):
        clock.advance(12.5)
        store.set(Set("key", 1))
        assert found(store, "key").stored_at == pytest.approx(clock.wall(), abs=1e-3)


# Values


class Thing:
    pass


def test_values_are_kept_by_reference(store: MemoryStore) -> None:
    value = [1]
    store.set(Set("key", value))
    assert value_of(store, "key") is value
    value.append(2)
    assert value_of(store, "key") == [1, 2]


@pytest.mark.parametrize(
    "remove",
    [
        lambda store: store.delete(Delete("key")),
        lambda store: store.delete_pattern(DeletePattern("k*")),
        lambda store: store.set(Set("key", 2)),
        lambda store: store.clear(Clear()),
        lambda store: store.set_many(SetMany({"a": 1, "b": 2, "c": 3})),
    ],
    ids=["delete", "delete_pattern", "overwrite", "clear", "evict"],
)
def test_a_removed_value_is_freed_at_once(clock: ManualClock, remove: Callable[[MemoryStore], object]) -> None:
    store = MemoryStore(max_entries=3, policy="lru", clock=clock)
    value = Thing()
    gone = weakref.ref(value)
    store.set(Set("key", value, ttl=1_000.0))
    store.set(Set("neighbour", 1, ttl=1_000.0))
    del value
    gc.disable()
    try:
        remove(store)
        assert gone() is None
    finally:
        gc.enable()


async def test_closing_lets_go_of_every_value(store: MemoryStore) -> None:
    value = Thing()
    gone = weakref.ref(value)
    store.set(Set("key", value))
    store.set(Set("neighbour", 1))
    del value
    await store.open()
    await store.close()
    await store.close()
    assert gone() is None
    assert len(store) == 0


@pytest.mark.parametrize("value", [True, 1.0, "1", None, b"1"])
def test_only_an_integer_can_be_incremented(store: MemoryStore, value: Any) -> None:
    store.set(Set("key", value))
    with pytest.raises(WrongType, match=f"increment requires an int, not {type(value).__name__}"):
        store.increment(Increment("key"))
    assert value_of(store, "key") is value


@pytest.mark.parametrize(("value", "delta"), [(2**63 - 1, 1), (-(2**63), -1), (0, 2**63), (2**200, 1)])
def test_a_counter_stays_within_64_bits(store: MemoryStore, value: int, delta: int) -> None:
    store.set(Set("key", value))
    with pytest.raises(WrongType, match="64-bit"):
        store.increment(Increment("key", delta))
    assert value_of(store, "key") == value
    with pytest.raises(WrongType, match="64-bit"):
        store.increment(Increment("new", delta, initial=value))
    assert value_of(store, "new") is Missing


class Calling:
    """A value whose end calls the cache that it was in, from within the turn that ends it."""

    def __init__(self, cache: Any, outcomes: list[Any]) -> None:
        self.cache = cache
        self.outcomes = outcomes

    def __del__(self) -> None:
        for call in (lambda: self.cache.get("other"), lambda: self.cache.set("mine", 1), self.cache.clear):
            try:
                self.outcomes.append(call())
            except CacheError as error:
                self.outcomes.append(error)


@pytest.mark.parametrize("remove", ["evict", "overwrite", "delete", "clear"])
def test_a_value_that_calls_the_cache_as_it_goes_gets_an_error_and_no_deadlock(remove: str) -> None:
    outcomes: list[Any] = []
    with open_sync_cache("memory://?max_entries=2&policy=lru") as cache:
        cache.set("key", Calling(cache, outcomes))
        cache.set("other", 1)
        match remove:
            case "evict":
                cache.set("third", 1)
            case "overwrite":
                cache.set("key", 1)
            case "delete":
                cache.delete("key")
            case _:
                cache.clear()
        assert len(outcomes) == 3
        for outcome in outcomes:
            assert isinstance(outcome, CacheError)
            assert "would deadlock" in str(outcome)
        cache.set("afterwards", 1)
        assert cache.get("afterwards") == 1
        assert cache.statistics().restarts == 0


def test_a_weigher_that_calls_the_cache_gets_an_error_and_no_deadlock() -> None:
    def weigh(value: Any) -> int:
        return len(cache.get("other", default=""))

    store = MemoryStore(max_bytes=10_000, weigher=weigh)
    with open_sync_cache("memory://", stores=lambda backend: store) as cache:
        with pytest.raises(CacheSerializationError, match="the weigher failed on a value of type int: CacheError"):
            cache.set("key", 1)
        assert cache.get("key") is None


# What is counted and told


def test_an_overwritten_value_is_told_with_what_it_went_for(store: MemoryStore, clock: ManualClock) -> None:
    told: list[tuple[str, RemovalCause]] = []
    store.on_removal = lambda key, cause: told.append((key, cause))
    store.set(Set("key", 1, ttl=1.0))
    store.set(Set("key", 2, ttl=1.0))
    clock.advance(1.0)
    store.set(Set("key", 3))
    store.increment(Increment("key"))
    assert told == [
        ("key", RemovalCause.REPLACED),
        ("key", RemovalCause.EXPIRED),
        ("key", RemovalCause.REPLACED),
    ]
    assert store.gauges().removals[RemovalCause.REPLACED] == 2


async def test_an_expired_value_that_is_overwritten_is_an_event(clock: ManualClock) -> None:
    stores: list[MemoryStore] = [MemoryStore(clock=clock)]
    async with open_cache("memory://", stores=lambda backend: stores[0], clock=clock) as cache:
        with cache.events("cache_expired", "cache_set") as events:
            await cache.set("key", 1, ttl=0.01)
            clock.advance(0.02)
            await cache.set("key", 2)
            kinds = [type(await anext(events)).__name__ for _ in range(3)]
        assert kinds == ["CacheSet", "CacheExpired", "CacheSet"]


def test_listeners_left_out_cost_nothing_and_change_nothing(store: MemoryStore) -> None:
    assert (store.on_read, store.on_write, store.on_removal, store.on_due) == (None, None, None, None)
    store.set(Set("key", 1, ttl=1.0))
    store.get(Get("key"))
    store.delete(Delete("key"))
    gauges = store.gauges()
    assert (gauges.hits, gauges.sets, gauges.removals[RemovalCause.EXPLICIT]) == (1, 1, 1)


# Making one


@pytest.mark.parametrize("bound", [0, -1])
@pytest.mark.parametrize("name", ["max_entries", "max_bytes"])
def test_a_bound_below_one_is_refused(name: str, bound: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, or None for no limit, not {bound}"):
        MemoryStore(**cast("Any", {name: bound}))


@pytest.mark.parametrize("ttl", [0, -1.5, math.nan, math.inf])
def test_a_default_ttl_that_is_no_time_is_refused(ttl: float) -> None:
    with pytest.raises(ValueError, match="default_ttl must be a positive number of seconds, or None, not"):
        MemoryStore(default_ttl=ttl)


def test_an_unknown_policy_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(ValueError, match=r"s3fifo.*lru.*lfu.*sieve") as caught:
        MemoryStore(policy="fifo")
    assert "fifo" in str(caught.value)


def test_its_repr_shows_how_full_it_is(clock: ManualClock) -> None:
    store = MemoryStore(max_entries=5, clock=clock)
    store.set(Set("key", 1))
    assert repr(store) == "<MemoryStore 1/5 entries>"
    bounded = MemoryStore(max_entries=None, max_bytes=1_000, weigher=lambda value: 1, clock=clock)
    bounded.set(Set("key", 1))
    assert repr(bounded) == f"<MemoryStore 1/unbounded entries, {ENTRY_OVERHEAD + 1}/1000 bytes>"


def test_it_names_what_it_can_do(store: MemoryStore) -> None:
    assert store.name == "memory"
    assert store.capabilities.names() == (
        "patterns",
        "tags",
        "compare_and_set",
        "counters",
        "leases",
        "rate_limits",
        "locks",
    )
    assert store.verb(Ping) is None
