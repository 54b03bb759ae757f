"""Exceptions from signal handlers and full stacks, at any instruction of a turn: nothing is lost but what was being done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cachebus import SyncCache, open_sync_cache
from cachebus.adapters.memory import MemoryStore
from tests.facade.faces import settings
from tests.interruptions import Hard, Injector, Soft, assert_sound, installed, raise_soft

OLD = {"a": 1, "b": 2, "c": 3, "n": 7}


class Bench:
    """A plain cache over a memory store that the test can look into."""

    def __init__(self, **options: Any) -> None:
        self.store = MemoryStore(**options)
        self.cache = open_sync_cache(settings(timeout=20.0), stores=lambda _: self.store)
        self.cell: Any = self.cache.link.bus.recipient(self.cache.link.address)

    def prepare(self) -> None:
        """Bring the cache into the state in which each attempt begins."""
        self.cache.clear()
        for key, value in OLD.items():
            self.cache.set(key, value, ttl=60.0, tags=["t", key])

    def check(self, allowed: dict[str, set[Any]]) -> None:
        """Assert that the next calls work, that values are right or missing, and that nothing else is left."""
        found = self.cache.get_many([*OLD, "new", "other"])
        for key, value in found.items():
            assert value in allowed.get(key, {OLD.get(key)}), key
        assert self.cache.set("after", 1)
        assert self.cache.get("after") == 1
        assert self.cache.delete("after")
        assert self.cache.statistics().restarts == 0
        assert self.cell._turn.free
        assert not self.cell._mailbox
        assert self.cell._crash is None
        assert not [each for each in self.cell._deferred if each.waiting]
        assert_sound(self.store)


STORES: dict[str, dict[str, Any]] = {
    "s3fifo": {},
    "lru": {"policy": "lru"},
    "lfu": {"policy": "lfu"},
    "weighed": {"policy": "sieve", "max_bytes": 2000, "weigher": lambda _: 10},
}


@pytest.fixture(params=STORES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(**{"max_entries": 5, **STORES[request.param]})
    yield bench
    bench.cache.close()


def _fill(cache: SyncCache) -> None:
    for number in range(4):
        cache.set("other", number, ttl=5.0)
        cache.set(f"fill:{number}", number)


VERBS: dict[str, tuple[Callable[[SyncCache], Any], dict[str, set[Any]]]] = {
    "get": (lambda cache: cache.get("a"), {}),
    "miss": (lambda cache: cache.get("new"), {}),
    "get_many": (lambda cache: cache.get_many(["a", "b", "new"]), {}),
    "exists": (lambda cache: cache.exists("a"), {}),
    "overwrite": (lambda cache: cache.set("a", 10, ttl=5.0, tags=["t", "u"]), {"a": {1, 10}}),
    "insert": (lambda cache: cache.set("new", 10, ttl=5.0, tags=["t", "u"]), {"new": {10}}),
    "evict": (_fill, {"other": {0, 1, 2, 3}}),
    "set_many": (lambda cache: cache.set_many({"a": 10, "new": 11}, tags=["u"]), {"a": {1, 10}, "new": {11}}),
    "add": (lambda cache: cache.add("new", 10), {"new": {10}}),
    "only_if": (lambda cache: cache.set("a", 10, only_if="present"), {"a": {1, 10}}),
    "compare_and_set": (
        lambda cache: cache.compare_and_set("a", 10, version=cache.lookup("a").version),  # type: ignore[union-attr]
        {"a": {1, 10}},
    ),
    "touch": (lambda cache: cache.touch("a", ttl=3.0), {}),
    "increment": (lambda cache: cache.increment("n"), {"n": {7, 8}}),
    "delete": (lambda cache: cache.delete("a"), {}),
    "delete_many": (lambda cache: cache.delete_many(["a", "b"]), {}),
    "delete_pattern": (lambda cache: cache.delete_pattern("[ab]"), {}),
    "scan": (lambda cache: list(cache.scan("*")), {}),
    "invalidate_tags": (lambda cache: cache.invalidate_tags("t", "a"), {}),
    "clear": (lambda cache: cache.clear(), {}),
    "get_or_load": (lambda cache: cache.get_or_load("a", lambda: 99), {}),
    "rate_limit": (lambda cache: cache.rate_limit("limit", 5, 60.0).check(), {}),
}


def throw_hard() -> None:
    raise Hard


def throw_soft() -> None:
    raise_soft()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("throw", [throw_hard, throw_soft])
def test_an_interruption_at_any_instruction_costs_no_more_than_what_was_being_done(
    bench: Bench, verb: str, throw: Callable[[], None]
) -> None:
    call, allowed = VERBS[verb]
    reached = True
    at = 0
    with installed(raise_soft):
        while reached:
            at += 1 if throw is throw_hard else 7
            bench.prepare()
            injector = Injector(at, throw)
            try:
                injector.run(lambda: call(bench.cache))
                assert not injector.reached, "the exception did not reach its caller"
            except (Hard, Soft):
                pass
            reached = injector.reached
            bench.check(allowed)
    assert at > 20
