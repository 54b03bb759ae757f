"""The simulation over a real Memcached: no invalidated value is read again.

`python -m tests.loading.real_server_memcached SEED` replays a seed and prints its events; `--seeds N` runs N seeds,
starting with SEED.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cachebus.adapters.memcached import session as memcached_session
from cachebus.adapters.memcached.key_updates import KeyUpdates
from cachebus.adapters.memcached.lookup import Lookup
from cachebus.adapters.memcached.session import Generations
from cachebus.adapters.memcached.values import content_of
from cachebus.testing.servers import Server, run_memcached

from .real_server_memcached import play_memcached

SEEDS = int(os.environ.get("CACHEBUS_SERVER_SEEDS", "150"))
FIRST = int(os.environ.get("CACHEBUS_FIRST_SEED", "1"))
PART = 50


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with run_memcached() as one, run_memcached() as other:
        yield [one, other]


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, PART))
@pytest.mark.parametrize("count", [1, 2])
def test_no_read_returns_what_was_invalidated_before_it_began(servers: list[Server], count: int, first: int) -> None:
    # The second server continues with the seeds after those of the first.
    seeds = range(first + (count - 1) * 10**6, first + (count - 1) * 10**6 + PART)
    worlds = [play_memcached(seed, servers[:count]) for seed in seeds]
    assert sum(world.reads for world in worlds) > 5 * PART
    assert sum(world.lost for world in worlds) > PART / 2, "evictions belong to it"


def test_a_seed_is_the_same_run_each_time(servers: list[Server]) -> None:
    first, second = play_memcached(7, servers[:1]), play_memcached(7, servers[:1])
    assert first.story == second.story
    assert len(first.story) > 10
    assert play_memcached(8, servers[:1]).story != first.story


def tags_are_not_looked_at(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Generations, "good", lambda self, marks: True)


def a_generation_that_is_missing_is_good(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Generations,
        "good",
        lambda self, marks: all(self.seen(self._keys.tag(tag)) in (b"", each) for tag, each in marks),
    )


def generations_come_again(patch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(10**9))
    patch.setattr(memcached_session, "fresh", lambda: b"%d" % (next(numbers) % 2 + 1))


def whoever_holds_the_lease_is_taken_for_the_one_who_asks(patch: pytest.MonkeyPatch) -> None:
    held = KeyUpdates._held
    patch.setattr(KeyUpdates, "_held", lambda self, token, item: item.held or held(self, token, item))


def who_asks_for_a_lease_is_given_what_is_invalid(patch: pytest.MonkeyPatch) -> None:
    read = Lookup.read

    def careless(self: Any, waiting: Any, replies: Any) -> Any:
        keyed = yield from read(self, waiting, replies)
        for _, item in keyed:
            if item.served is None:
                self.take_apart(item)
                if item.served is not None:
                    item.content = yield from content_of(self.session, item.served)
        return keyed

    patch.setattr(Lookup, "read", careless)


PLANTED: list[tuple[Callable[[pytest.MonkeyPatch], None], int]] = [
    (tags_are_not_looked_at, 1),
    (a_generation_that_is_missing_is_good, 335),
    (generations_come_again, 1),
    (whoever_holds_the_lease_is_taken_for_the_one_who_asks, 1),
    (who_asks_for_a_lease_is_given_what_is_invalid, 30),
]
"""Planted bugs, each with the first seed of its search, a little before a seed that finds it."""


@pytest.mark.parametrize(("plant", "first"), PLANTED, ids=lambda each: getattr(each, "__name__", ""))
def test_a_planted_bug_is_found(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], first: int
) -> None:
    plant(monkeypatch)

    def search() -> None:
        for seed in range(first, first + 2_000):
            play_memcached(seed, servers[:1])

    with pytest.raises(AssertionError, match=r"seed \d+: key\d was read as \d+, but \d+ had been made known"):
        search()
