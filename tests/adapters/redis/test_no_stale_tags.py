"""After an invalidation has returned, no later read returns a value loaded before it.

Tested on a real server, for any order of the messages of several stores, and with counters that the server loses.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from cachebus.adapters.redis import leases as redis_leases
from cachebus.adapters.redis import planner as redis_plan
from cachebus.adapters.redis import runs as redis_runs
from cachebus.adapters.redis import scripts as redis_scripts
from cachebus.adapters.redis import store as redis
from cachebus.adapters.redis.entry import TagStamp
from cachebus.adapters.redis.scripts import Script, ScriptVariants
from cachebus.testing.servers import Server, run_redis_cluster

from .schedule import Gate, World, open_stores, replay

SEEDS = int(os.environ.get("CACHEBUS_SEEDS", "200"))
FIRST = int(os.environ.get("CACHEBUS_FIRST_SEED", "1"))
PART = 100


@pytest.fixture
async def stores(server: Server) -> AsyncIterator[Sequence[Any]]:
    async with AsyncExitStack() as stack:
        yield await open_stores([server], stack)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Sequence[Server]]:
    with run_redis_cluster() as servers:
        yield servers


async def worlds(first: int, count: int, stores: Sequence[Any]) -> tuple[int, int]:
    """Run many seeds, and return how often values were read and stored."""
    hits = stored = 0
    with Gate() as gate:
        for seed in range(first, first + count):
            world = World(seed, stores, gate)
            await world.run()
            hits, stored = hits + world.hits, stored + world.stored
    return hits, stored


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, PART))
async def test_no_read_returns_what_was_invalidated_before_it_began(first: int, stores: Sequence[Any]) -> None:
    hits, stored = await worlds(first, PART, stores)
    assert hits > 2 * PART
    assert stored > PART


async def test_nor_in_a_cluster(cluster: Sequence[Server]) -> None:
    async with AsyncExitStack() as stack:
        hits, stored = await worlds(FIRST, SEEDS // 4, await open_stores(cluster, stack))
    assert hits > SEEDS // 4
    assert stored > SEEDS // 8


@pytest.mark.parametrize("where", ["one server", "a cluster"])
async def test_a_seed_is_the_same_run_each_time(server: Server, cluster: Sequence[Server], where: str) -> None:
    servers = [server] if where == "one server" else cluster
    first, second, other = [(await replay(seed, servers)).story for seed in (7, 7, 8)]
    assert first == second
    assert len(first) > 50
    assert other != first


def scripts_with(old: str, new: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Return a function that plants a bug in every script that contains `old`."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        planted = 0
        for module in (redis_leases, redis_scripts):
            for name, script in list(vars(module).items()):
                if isinstance(script, Script) and old in script.text:
                    patch.setattr(module, name, Script(script.text.replace(old, new)))
                    planted += 1
                elif isinstance(script, ScriptVariants) and old in script.here.text:
                    patch.setattr(script, "here", Script(script.here.text.replace(old, new)))
                    planted += 1
        for module in (redis_runs, redis_plan, redis):
            for name in ("READ", "INVALIDATE", "KEEP"):
                if hasattr(module, name):
                    patch.setattr(module, name, getattr(redis_scripts, name))
        assert planted

    return plant


def one_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(redis_plan, "new_epoch", lambda: bytes(range(8)))


def trusting_claims(patch: pytest.MonkeyPatch) -> None:
    holds = TagStamp.holds

    def trusts(tag_stamp: TagStamp, counters: Any) -> bool:
        return holds(tag_stamp, {tag: counter or tag_stamp.stamp for tag, counter in counters.items()})

    patch.setattr(TagStamp, "holds", trusts)


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], bool]] = {
    "the stamp is that of the end of the load": (
        scripts_with(
            "if is_revoked(stamp, known) or", "stamp = stamp_of(tags, '', ARGV[5])\nif is_revoked(stamp, known) or"
        ),
        False,
    ),
    "a counter that is lost is trusted": (
        scripts_with("return not counter or", "if not counter then return false end return"),
        False,
    ),
    "a counter that was lost begins at nothing": (
        scripts_with("#number == 8 and number or", "false or"),
        False,
    ),
    "a sequence that was lost begins with the same epoch": (one_epoch, False),
    "an invalidation does not count": (
        scripts_with("struct.unpack('>d', stamp, 9) + 1)", "struct.unpack('>d', stamp, 9))"),
        False,
    ),
    "a store trusts counters that are lost": (trusting_claims, True),
}


@pytest.mark.parametrize("bug", PLANTED)
async def test_a_planted_bug_is_found(
    bug: str, server: Server, cluster: Sequence[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, in_cluster = PLANTED[bug]
    plant(monkeypatch)
    async with AsyncExitStack() as stack:
        stores = await open_stores(cluster if in_cluster else [server], stack)
        with pytest.raises(AssertionError, match=r"seed \d+: .* was read as \d+, but \d+ had been made known"):
            await worlds(1, 300, stores)
