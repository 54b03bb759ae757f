"""Tags of a store in this process."""

from __future__ import annotations

import pytest

from cachebus.adapters.memory.eviction import Entry
from cachebus.adapters.memory.store import MemoryStore
from cachebus.adapters.memory.tags import TagTable
from cachebus.messages import Clear, Delete, Found, Get, Increment, Incremented, InvalidateTags, Missing, Set

from ...clock import ManualClock


def entry(version: float, *tags: str) -> Entry:
    return Entry("key", "value", version, tags=tags)


@pytest.fixture
def table() -> TagTable:
    return TagTable()


def test_an_entry_is_valid_until_one_of_its_tags_is_invalidated(table: TagTable) -> None:
    table.attach(("red", "green"))
    old = entry(1.0, "red", "green")
    assert table.valid(old)
    table.invalidate("green", 2.0)
    assert not table.valid(old)


def test_an_entry_written_after_the_invalidation_is_valid(table: TagTable) -> None:
    table.attach(("red",))
    table.invalidate("red", 2.0)
    table.attach(("red",))
    assert not table.valid(entry(2.0, "red"))
    assert table.valid(entry(3.0, "red"))


def test_an_invalidation_leaves_other_tags_alone(table: TagTable) -> None:
    table.attach(("red",))
    table.attach(("green",))
    table.invalidate("red", 5.0)
    assert table.valid(entry(1.0, "green"))


def test_a_tag_that_nobody_carries_is_not_remembered(table: TagTable) -> None:
    table.invalidate("nobody", 1.0)
    assert len(table._tags) == 0


def test_a_tag_is_forgotten_with_its_last_entry(table: TagTable) -> None:
    table.attach(("red",))
    table.attach(("red", "green"))
    assert len(table._tags) == 2
    table.detach(("red", "green"))
    assert len(table._tags) == 1
    table.detach(("red",))
    assert len(table._tags) == 0


def test_clear_forgets_every_tag(table: TagTable) -> None:
    table.attach(("red", "green"))
    table.clear()
    assert len(table._tags) == 0


def test_a_tag_given_twice_is_let_go_of_twice(table: TagTable) -> None:
    table.attach(("red", "red"))
    table.detach(("red", "red"))
    assert len(table._tags) == 0


# In the store


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(max_entries=None, clock=ManualClock())


def test_an_invalidation_looks_at_no_entry(store: MemoryStore) -> None:
    for number in range(10_000):
        store.set(Set(f"k{number}", number, tags=("all",)))
    store.invalidate_tags(InvalidateTags(("all",)))
    assert len(store) == 10_000, "it is O(1): entries go when they are met"
    assert all(store.get(Get(f"k{number}")) == Missing() for number in range(10_000))
    assert len(store) == 0
    assert len(store._tags._tags) == 0


def test_an_overwritten_entry_leaves_its_old_tags(store: MemoryStore) -> None:
    store.set(Set("key", 1, tags=("old",)))
    store.set(Set("key", 2, tags=("new",)))
    store.invalidate_tags(InvalidateTags(("old",)))
    assert isinstance(store.get(Get("key")), Found)
    store.invalidate_tags(InvalidateTags(("new",)))
    assert store.get(Get("key")) == Missing()


def test_an_entry_set_anew_with_the_same_tag_is_valid_again_at_the_same_instant(store: MemoryStore) -> None:
    store.set(Set("key", 1, tags=("tag",)))
    store.invalidate_tags(InvalidateTags(("tag",)))
    store.set(Set("key", 2, tags=("tag",)))
    found = store.get(Get("key"))
    assert isinstance(found, Found)
    assert found.value == 2


def test_an_increment_keeps_the_tags_and_does_not_revive_what_was_invalidated(store: MemoryStore) -> None:
    store.set(Set("n", 5, tags=("tag",)))
    store.increment(Increment("n"))
    found = store.get(Get("n"))
    assert isinstance(found, Found)
    assert found.tags == ("tag",)
    store.invalidate_tags(InvalidateTags(("tag",)))
    assert store.increment(Increment("n")) == Incremented(1)


def test_the_table_is_bounded_by_the_entries(store: MemoryStore) -> None:
    bounded = MemoryStore(max_entries=10, clock=ManualClock())
    for number in range(1_000):
        bounded.set(Set(f"k{number}", number, tags=(f"t{number}",)))
        bounded.invalidate_tags(InvalidateTags((f"t{number}", f"unknown{number}")))
    assert len(bounded._tags._tags) == len(bounded) == 10
    bounded.delete(Delete("k999"))
    assert len(bounded._tags._tags) == 9
    bounded.clear(Clear())
    assert len(bounded._tags._tags) == 0


def test_names_that_look_alike_are_different_tags(store: MemoryStore) -> None:
    store.set(Set("one", 1, tags=("a:b", "c")))
    store.set(Set("two", 2, tags=("a", "b:c")))
    store.invalidate_tags(InvalidateTags(("a:b",)))
    assert store.get(Get("one")) == Missing()
    assert isinstance(store.get(Get("two")), Found)
