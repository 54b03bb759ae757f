"""After an invalidation has returned, no later read ever returns a value that was loaded before it.

Thousands of simulated worlds check this; `make soak` runs millions. To show that the simulation can fail, the tests plant
bugs and check that a few hundred worlds find each of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from cachebus import Cache
from cachebus.adapters.memory.leases import Lease
from cachebus.adapters.memory.store import MemoryStore
from cachebus.loading.singleflight import Value
from cachebus.messages import Stale

from .simulation import simulate

# For other seeds: CACHEBUS_FIRST_SEED=100001 CACHEBUS_SEEDS=10000. `make soak` runs millions.
SEEDS = int(os.environ.get("CACHEBUS_SEEDS", "2000"))
FIRST = int(os.environ.get("CACHEBUS_FIRST_SEED", "1"))
PART = 100


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, PART))
def test_no_read_returns_what_was_invalidated_before_it_began(first: int) -> None:
    reads = sum(simulate(seed).reads for seed in range(first, first + PART))
    assert reads > 5 * PART


def test_a_seed_is_the_same_run_each_time() -> None:
    first, second = simulate(7), simulate(7)
    assert first.story == second.story
    assert len(first.story) > 10
    assert simulate(8).story != first.story


class DeletesLeaveLeases(MemoryStore):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._leases.revoke = lambda key: None  # type: ignore[method-assign]


class ClearLeavesLeases(MemoryStore):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._leases.revoke_all = lambda matches=None: None  # type: ignore[method-assign]


class TagsLeaveLeases(MemoryStore):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._leases.revoke_tags = lambda tags, version: None  # type: ignore[method-assign]


class TagsThatTheLoaderNamesAreForgotten(MemoryStore):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._leases.was_lost = lambda lease, tags: False  # type: ignore[method-assign]


class WritesLeaveLeases(MemoryStore):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._on_overwrite = lambda entry: None


class LeasesNeverEnd(MemoryStore):
    """Planted bug: a former leaseholder may store, even if another caller holds the lease now."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        forever: dict[tuple[str, str], Lease] = {}
        held, grant, forget = self._leases.held, self._leases.grant, self._leases.take

        def remember(request: Any, version: float, now: float) -> Lease:
            lease = grant(request, version, now)
            forever[request.key, lease.token] = lease
            return lease

        self._leases.grant = remember  # type: ignore[method-assign]
        self._leases.held = lambda key, token, now: held(key, token, now) or forever.get((key, token))  # type: ignore[method-assign]
        self._leases.take = lambda lease: forget(lease) if self._leases.by_key.get(lease.request.key) is lease else None  # type: ignore[method-assign]


class LeasesAreNamedByTheirQuestion(MemoryStore):
    """Planted bug: a late copy of a lease request is granted the same lease that an invalidation revoked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        grant = self._leases.grant

        def unnamed(request: Any, version: float, now: float) -> Lease:
            lease = grant(request, version, now)
            lease.token = request.token
            return lease

        self._leases.grant = unnamed  # type: ignore[method-assign]


class DeletesLeaveTheStale(MemoryStore):
    def _delete(self, keys: tuple[str, ...]) -> int:
        now = self.now()
        live = tuple(key for key in keys if self.live(key, now) is not None)
        return super()._delete(live)


class InvalidTagsAreServedStale(MemoryStore):
    def stale(self, key: str, now: float, lease: str = "", remaining: float = 0.0) -> Stale | None:
        entry = self._entries.get(key)
        if entry is None or not entry.tags:
            return super().stale(key, now, lease, remaining)
        tags, entry.tags = entry.tags, ()
        try:
            return super().stale(key, now, lease, remaining)
        finally:
            entry.tags = tags


class LateValuesGoToEverybody(MemoryStore):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._leases.deliver_late = lambda lease, late, now: self._leases.answer_all(lease, late)  # type: ignore[method-assign]


def everybody_shares(cache: Cache) -> None:
    """Planted bug: a caller takes the value that its process loaded without checking its dependencies."""
    loads = cache.loads
    wait = loads._wait

    async def share(*arguments: Any, **options: Any) -> Any:
        outcome = await wait(*arguments, **options)
        return Value(outcome.value) if isinstance(outcome, Value) else outcome

    loads._wait = share  # type: ignore[method-assign]


def joins_without_asking(cache: Cache) -> None:
    """Planted bug: a caller joins the load of its process without asking the store if its lease is still valid."""
    loads = cache.loads
    deliver, track = loads._deliver, loads.table.renewals.track
    under_way: dict[str, Any] = {}

    async def join(runner: Any, job: Any, request: Any, reply: Any, started: float | None = None) -> Any:
        if (in_flight := under_way.get(job.key)) is not None and not in_flight.resolved:
            outcome = await in_flight.wait()
            if isinstance(outcome, Value):
                return outcome.value
        return await deliver(runner, job, request, reply, started)

    def remember(name: str, timers: Any, due: float, renew: Any) -> None:
        load = renew.__self__
        under_way[load.job.key] = load.in_flight
        track(name, timers, due, renew)

    loads._deliver = join  # type: ignore[method-assign]
    loads.table.renewals.track = remember  # type: ignore[method-assign]


def nothing(cache: Cache) -> None:
    """Leave the facade unchanged."""


PLANTED: list[tuple[type[MemoryStore], Callable[[Cache], None], int]] = [
    (DeletesLeaveLeases, nothing, 1),
    (ClearLeavesLeases, nothing, 1),
    (TagsLeaveLeases, nothing, 10),
    (TagsThatTheLoaderNamesAreForgotten, nothing, 10),
    (WritesLeaveLeases, nothing, 40),
    (LeasesNeverEnd, nothing, 1),
    (LeasesAreNamedByTheirQuestion, nothing, 320),
    (DeletesLeaveTheStale, nothing, 170),
    (InvalidTagsAreServedStale, nothing, 40),
    (LateValuesGoToEverybody, nothing, 140),
    (MemoryStore, everybody_shares, 200),
    (MemoryStore, joins_without_asking, 20),
]
"""Planted bugs, each with the first seed of its search, a little before a seed that finds it."""


@pytest.mark.parametrize(("store", "prepare", "first"), PLANTED, ids=lambda each: getattr(each, "__name__", ""))
def test_a_planted_bug_is_found(store: type[MemoryStore], prepare: Callable[[Cache], None], first: int) -> None:
    def search() -> None:
        for seed in range(first, first + 2_000):
            simulate(seed, store, prepare)

    with pytest.raises(AssertionError, match=r"seed \d+: key\d was read as \d+, but \d+ had been made known"):
        search()
