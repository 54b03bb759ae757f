"""A lease ends with its load, however the load ends. A cancelled caller also cancels its lease request."""

from __future__ import annotations

from typing import Any, cast

import pytest

from cachebus import Cache, LoadResult, Node, Settings, open_cache
from cachebus.adapters.memory.store import MemoryStore
from cachebus.bus import DeferredReply
from cachebus.messages import Delete, GetOrLease, LeaseGranted, NotHeld, Released, ReleaseLease
from cachebus.testing.servers import Server, nats_server

from ..clock import ManualClock

__all__ = ["nats_server"]

TOO_LARGE = "x" * 2_000_000
"""Value larger than 1 MiB, the maximum size of a NATS message."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("result", [TOO_LARGE, LoadResult(TOO_LARGE, store=False)], ids=["stored", "not stored"])
async def test_a_value_that_is_too_large_for_the_bus_does_not_keep_its_lease(nats_server: Server, result: Any) -> None:
    url = nats_server.url
    async with (
        Node(Settings(namespace="large", bus=cast("Any", url)), serve=True),
        open_cache("bus:primary", bus=url, namespace="large") as one,
        open_cache("bus:primary", bus=url, namespace="large") as other,
    ):

        async def large() -> Any:
            return result

        async def lease_is_free(cache: Cache) -> bool:
            reply = await cache.client.request(GetOrLease("k", "somebody", "token", 60.0))
            return isinstance(reply, LeaseGranted)

        assert await one.get_or_load("k", large, lease_ttl=600, ttl=60) == TOO_LARGE
        assert await one.get("k") is None
        assert await lease_is_free(other)


async def test_a_question_that_is_given_back_while_it_waits_is_answered() -> None:
    store = MemoryStore()
    parked: list[DeferredReply] = []

    def defer() -> DeferredReply:
        parked.append(DeferredReply())
        return parked[-1]

    store.defer = defer
    theirs = store._leases.get_or_lease(GetOrLease("k", "another process", "a", 60.0))
    assert isinstance(theirs, LeaseGranted)
    for number in range(20):
        assert store._leases.get_or_lease(GetOrLease("k", "p", f"q{number}", 60.0, 60.0)) is parked[-1]
        assert parked[-1].waiting
        assert isinstance(store._leases.release(ReleaseLease("k", f"q{number}")), NotHeld)
    assert len(parked) == 20
    assert not any(each.waiting for each in parked)
    assert isinstance(store._leases.release(ReleaseLease("k", theirs.token)), Released)


def test_a_lost_lease_ends_with_the_last_question_that_waits_for_it() -> None:
    clock = ManualClock()
    store = MemoryStore(clock=clock)
    store.defer = DeferredReply
    for lost in (False, True):
        assert isinstance(store._leases.get_or_lease(GetOrLease("k", "another process", f"{lost}", 60.0)), LeaseGranted)
        store._leases.get_or_lease(GetOrLease("k", "p", f"q{lost}", 60.0, 30.0))
        if lost:
            store.delete(Delete("k"))
        store._leases.release(ReleaseLease("k", f"q{lost}"))
        clock.advance(100.0)
        store.sweep(100)
        assert not store._leases._revoked
