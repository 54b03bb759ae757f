"""The eviction policies against slow models, their invariants, and what the default one has learned to do."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachebus.adapters.memory.eviction import POLICIES, VISITS_MAX, Entry, EvictionPolicy, Ring, make_policy
from cachebus.adapters.memory.eviction.s3fifo import S3FifoPolicy
from cachebus.messages import CacheConfigurationError

NAMES = sorted(POLICIES)
Step = tuple[str, int]
steps = st.lists(st.tuples(st.sampled_from(["get", "get", "get", "delete"]), st.integers(0, 11)), max_size=150)
each_policy = pytest.mark.parametrize("name", NAMES)


class Store:
    """Drives a policy as the memory store does: room is made before a newcomer is admitted."""

    def __init__(self, name: str, capacity: int, told: bool = True) -> None:
        self.policy: EvictionPolicy = make_policy(name, capacity if told else None)
        self.capacity = capacity
        self.entries: dict[str, Entry] = {}
        self.victims: list[str] = []
        self.hits = 0

    def get(self, key: str) -> bool:
        entry = self.entries.get(key)
        if entry is None:
            while len(self.entries) >= self.capacity:
                victim = self.policy.evict()
                assert self.entries.pop(victim.key) is victim, "a victim must be resident"
                self.victims.append(victim.key)
            self.entries[key] = entry = Entry(key, None, 0)
            self.policy.admit(entry)
            return False
        self.hits += 1
        if self.policy.on_hit is not None:
            self.policy.on_hit(entry)
        elif entry.visits < VISITS_MAX:
            entry.visits += 1
        return True

    def delete(self, key: str) -> None:
        entry = self.entries.pop(key, None)
        if entry is not None:
            self.policy.forget(entry)

    def run(self, script: Iterable[Step]) -> Store:
        for verb, number in script:
            getattr(self, verb)(f"k{number}")
            assert len(self.policy) == len(self.entries) <= self.capacity
        return self


def hit_ratio(name: str, capacity: int, requests: Iterable[int]) -> float:
    store = Store(name, capacity)
    seen = [store.get(f"k{number}") for number in requests]
    return sum(seen) / len(seen)


def victims_of_lru(script: list[Step], capacity: int) -> list[str]:
    order: list[str] = []
    victims: list[str] = []
    for verb, number in script:
        key = f"k{number}"
        known = key in order
        if known:
            order.remove(key)
        if verb == "delete":
            continue
        if not known and len(order) >= capacity:
            victims.append(order.pop(0))
        order.append(key)
    return victims


def victims_of_lfu(script: list[Step], capacity: int) -> list[str]:
    uses: dict[str, tuple[int, int]] = {}  # uses, and when that number was reached
    victims: list[str] = []
    for now, (verb, number) in enumerate(script):
        key = f"k{number}"
        if verb == "delete":
            uses.pop(key, None)
            continue
        if key not in uses and len(uses) >= capacity:
            victims.append(min(uses, key=lambda each: uses[each]))
            del uses[victims[-1]]
        uses[key] = (uses.get(key, (0, 0))[0] + 1, now)
    return victims


def victims_of_sieve(script: list[Step], capacity: int) -> list[str]:
    order: list[str] = []  # old to young
    visited: dict[str, bool] = {}
    hand = 0  # an index: `order[hand]` is looked at next, past the end means the oldest
    victims: list[str] = []
    for verb, number in script:
        key = f"k{number}"
        if verb == "delete":
            if key in visited:
                at = order.index(key)
                order.pop(at)
                del visited[key]
                hand -= at < hand
            # A hand that ran off the young end starts again at the old one, even if somebody young came since.
            if hand >= len(order):
                hand = 0
            continue
        if key in visited:
            visited[key] = True
            continue
        if len(order) >= capacity:
            while visited[order[hand]]:
                visited[order[hand]] = False
                hand = (hand + 1) % len(order)
            victims.append(order.pop(hand))
            del visited[victims[-1]]
            if hand >= len(order):
                hand = 0
        order.append(key)
        visited[key] = False
    return victims


MODELS: dict[str, Callable[[list[Step], int], list[str]]] = {
    "lru": victims_of_lru,
    "lfu": victims_of_lfu,
    "sieve": victims_of_sieve,
}


@pytest.mark.parametrize("name", sorted(MODELS))
@given(script=steps, capacity=st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_victims_go_in_the_order_of_a_slow_and_simple_model(name: str, script: list[Step], capacity: int) -> None:
    assert Store(name, capacity).run(script).victims == MODELS[name](script, capacity)


@each_policy
@pytest.mark.parametrize("told", [True, False])
@given(script=steps, capacity=st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_no_entry_is_lost_doubled_or_evicted_after_it_was_forgotten(
    name: str, told: bool, script: list[Step], capacity: int
) -> None:
    store = Store(name, capacity, told).run(script)
    left = [store.policy.evict().key for _ in range(len(store.policy))]
    assert sorted(left) == sorted(store.entries)
    assert len(store.policy) == 0


@each_policy
@given(script=steps, capacity=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_a_newcomer_survives_its_own_admission(name: str, script: list[Step], capacity: int) -> None:
    store = Store(name, capacity)
    for verb, number in script:
        store.run([(verb, number)])
        assert verb == "delete" or f"k{number}" in store.entries


@each_policy
@given(script=steps, capacity=st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_the_same_requests_have_the_same_victims_also_after_a_clear(
    name: str, script: list[Step], capacity: int
) -> None:
    store = Store(name, capacity).run(script)
    first = list(store.victims)
    store.policy.clear()
    store.entries.clear()
    store.victims.clear()
    assert len(store.policy) == 0
    assert store.run(script).victims == first == Store(name, capacity).run(script).victims


@given(script=steps, capacity=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_the_ghosts_of_s3fifo_are_bounded_and_remember_no_resident(script: list[Step], capacity: int) -> None:
    store = Store("s3fifo", capacity)
    policy = cast(Any, store.policy)
    for step in script:
        store.run([step])
        assert len(policy._ghost) <= 1.5 * capacity
        assert len(policy._feedback._victims) <= 0.5 * capacity + 1
        remembered = [*policy._ghost, *policy._feedback._victims]
        assert len(set(remembered)) == len(remembered)
        assert not set(remembered) & set(store.entries)
        assert set(policy._feedback._trials) <= set(store.entries)


def test_s3fifo_remembers_nothing_before_the_first_eviction() -> None:
    store = Store("s3fifo", 100).run([("get", number % 100) for number in range(300)])
    policy = cast(Any, store.policy)
    assert not policy._ghost
    assert not len(policy._feedback._victims)


def test_s3fifo_learned_nothing_after_a_clear() -> None:
    store = Store("s3fifo", 50).run([("get", number % 70) for number in range(3_000)])
    policy = cast(Any, store.policy)
    assert policy._return_filter.share < 1
    policy.clear()
    assert (policy._return_filter.share, len(policy._ghost), len(policy._feedback._victims)) == (1, 0, 0)


def test_a_forgotten_challenger_keeps_no_entry_alive() -> None:
    store = Store("s3fifo", 50)
    policy = cast(Any, store.policy)
    for number in range(3_000):
        store.get(f"k{number % 70}")
        if policy._feedback._trials:
            break
    candidate = next(iter(policy._feedback._trials))
    entry = store.entries[candidate]
    store.delete(candidate)
    assert all(each is not entry for each in policy._feedback._victims.values())


@each_policy
def test_an_evicting_insert_takes_as_many_steps_in_a_large_store_as_in_a_small_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            nonlocal count
            count += 1
            return method(*args)

        return run

    for verb in ("append", "remove", "rotate", "younger", "oldest"):
        monkeypatch.setattr(Ring, verb, counted(getattr(Ring, verb)))

    def steps_per_request(capacity: int) -> float:
        nonlocal count
        lots = random.Random(1)
        store = Store(name, capacity)
        for number in range(capacity):
            store.get(f"k{number}")
        count = 0
        for _ in range(6 * capacity):
            store.get(f"k{int(4 * capacity * lots.random() ** 3)}")
        return count / (6 * capacity)

    assert steps_per_request(5_000) <= 1.2 * steps_per_request(100) + 0.5


def test_the_hand_of_s3fifo_is_paid_for_by_hits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = 0
    rotate = Ring.rotate

    def counted(ring: Ring) -> None:
        nonlocal turns
        turns += 1
        rotate(ring)

    monkeypatch.setattr(Ring, "rotate", counted)
    lots = random.Random(2)
    store = Store("s3fifo", 200)
    for _ in range(20_000):
        store.get(f"k{int(2_000 * lots.random() ** 4)}")
    assert 0 < turns <= store.hits


def loop(length: int, count: int) -> list[int]:
    return [number % length for number in range(count)]


def plain_s3fifo(capacity: int, requests: Iterable[int]) -> float:
    """S3-FIFO as published, in its slowest and shortest form: what the adaptive one is compared with."""
    small: list[int] = []
    main: list[int] = []
    ghost: list[int] = []
    visits: dict[int, int] = {}
    seen: list[bool] = []
    for key in requests:
        seen.append(key in visits)
        if key in visits:
            visits[key] = min(VISITS_MAX, visits[key] + 1)
            continue
        while len(visits) >= capacity:
            if len(small) >= max(1, capacity // 10) or not main:
                victim = small.pop(0)
                if visits[victim] > 1:
                    visits[victim] = 0
                    main.append(victim)
                else:
                    del visits[victim]
                    ghost = [*ghost, victim][-capacity:]
            else:
                victim = main.pop(0)
                if visits[victim]:
                    visits[victim] -= 1
                    main.append(victim)
                else:
                    del visits[victim]
        visits[key] = 0
        (main if key in ghost else small).append(key)
    return sum(seen) / len(seen)


@pytest.mark.parametrize(("length", "floor"), [(130, 0.66), (200, 0.42), (500, 0.15)])
def test_in_a_loop_larger_than_the_cache_a_stable_part_stays(length: int, floor: float) -> None:
    requests = loop(length, 20_000)
    assert hit_ratio("s3fifo", 100, requests) > floor
    assert hit_ratio("lru", 100, requests) == 0
    assert plain_s3fifo(100, requests) < floor


def test_a_scan_does_not_flush_the_hot_keys() -> None:
    lots = random.Random(3)
    requests: list[int] = []
    for start in range(0, 20_000, 500):
        requests += [int(100 * lots.random()) for _ in range(500)]
        requests += range(1_000 + start, 1_500 + start)
    assert hit_ratio("s3fifo", 150, requests) > 0.46
    assert hit_ratio("lru", 150, requests) < 0.46


def test_when_the_loop_moves_on_the_dead_part_is_pushed_out() -> None:
    requests = [number + 10_000 * phase for phase in range(4) for number in loop(300, 9_000)]
    assert hit_ratio("s3fifo", 100, requests) > 0.15
    assert hit_ratio("lru", 100, requests) == 0
    assert plain_s3fifo(100, requests) < 0.15


def test_when_all_popularity_moves_the_new_favourites_take_over() -> None:
    lots = random.Random(4)
    requests = [int(2_000 * lots.random() ** 4) + 10_000 * phase for phase in range(10) for _ in range(3_000)]
    ours = hit_ratio("s3fifo", 200, requests)
    assert ours > hit_ratio("lru", 200, requests) - 0.03
    assert ours > hit_ratio("lfu", 200, requests) + 0.1


def test_the_gate_closes_in_a_tight_loop_and_opens_again_when_popularity_moves() -> None:
    store = Store("s3fifo", 100).run([("get", number) for number in loop(140, 8_000)])
    admission = cast(S3FifoPolicy, store.policy)._return_filter
    closed = admission.share
    assert closed < 0.3
    lots = random.Random(5)
    for phase in range(1, 8):
        store.run([("get", 1_000 * phase + int(400 * lots.random() ** 3)) for _ in range(3_000)])
    assert admission.share > closed + 0.2


def test_the_names_of_the_settings_make_their_policies_and_no_others() -> None:
    assert NAMES == ["lfu", "lru", "s3fifo", "sieve"]
    assert next(iter(POLICIES)) == "s3fifo"
    with pytest.raises(CacheConfigurationError, match="s3fifo, lru, lfu, sieve, not 'mru'"):
        make_policy("mru", 10)


def test_only_the_eager_policies_ask_to_be_told_of_hits() -> None:
    assert {name for name in NAMES if make_policy(name, 10).on_hit is not None} == {"lru", "lfu"}


def test_a_ring_turns_and_walks_from_old_to_young() -> None:
    ring = Ring()
    entries = [Entry(key, None, 0) for key in "abc"]
    for entry in entries:
        ring.append(entry)
    ring.rotate()
    order = [ring.oldest()]
    while (after := ring.younger(order[-1])) is not None:
        order.append(after)
    assert [entry.key for entry in order] == ["b", "c", "a"]
    for entry in order:
        ring.remove(entry)
    assert ring.size == 0
    ring.append(entries[0])
    ring.rotate()
    assert ring.oldest() is entries[0]
