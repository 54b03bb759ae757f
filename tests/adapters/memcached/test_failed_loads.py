"""A failed load on a real Memcached: its waiters get the name of the loader's error."""

from __future__ import annotations

from typing import Any

import pytest

from cachebus.adapters.memcached.lookup import FAILURE_SHOWN
from cachebus.adapters.memcached.store import MemcachedStore
from cachebus.messages import (
    Add,
    Delete,
    Failed,
    Found,
    Get,
    GetOrLease,
    InvalidateTags,
    LeaseGranted,
    LoaderFailed,
    Loading,
    LoadMetadata,
    Missing,
    NotHeld,
    NotStored,
    Released,
    ReleaseLease,
    RenewLease,
    Request,
    Set,
    Stored,
)
from cachebus.testing.servers import Server
from cachebus.testing.suite.base import granted

from .conftest import one, opened
from .test_leases import SECONDS_LATE, connection_of, left

LONG = 60.0


def lease(token: str, *, after: str = "", ttl: float = LONG, **more: Any) -> GetOrLease:
    return GetOrLease("k", f"owner of {token}", token, ttl, after=after, **more)


async def failed(store: MemcachedStore, token: str, **more: Any) -> str:
    """Take a lease, release it as failed, and return its name."""
    name = await granted(store, lease(token, **more))
    assert await one(store, ReleaseLease("k", name, "OSError")) == Released()
    return name


def told(reply: Any) -> str:
    """Return the name of the error that the loader raised."""
    assert isinstance(reply, Failed), reply
    error = reply.error()
    assert isinstance(error, LoaderFailed)
    return error.error


async def test_all_who_wait_for_it_are_told_as_often_as_they_ask_and_the_next_loads_at_once(
    store: MemcachedStore,
) -> None:
    name = await failed(store, "t1")
    for token in ("t2", "t3", "t2"):
        assert told(await one(store, lease(token, after=name))) == "OSError"
    assert await one(store, Get("k")) == Missing()
    theirs = await granted(store, lease("t4"))
    assert told(await one(store, lease("t5", after=name))) == "OSError", "even while the next load runs"
    assert isinstance(loading := await one(store, lease("t6", after=theirs)), Loading)
    assert loading.token == theirs
    assert isinstance(await one(store, Set("k", b"v", LONG, lease=theirs)), Stored)
    assert (await one(store, lease("t7", after=name))).value == b"v"


async def test_the_last_failure_counts(store: MemcachedStore) -> None:
    first = await failed(store, "t1")
    second = await granted(store, lease("t2"))
    assert await one(store, ReleaseLease("k", second, "ValueError")) == Released()
    assert told(await one(store, lease("t3", after=second))) == "ValueError"
    assert isinstance(await one(store, lease("t4", after=first)), LeaseGranted)


async def test_a_load_that_was_given_up_is_no_failure(store: MemcachedStore) -> None:
    name = await granted(store, lease("t1"))
    assert await one(store, ReleaseLease("k", name)) == Released()
    assert isinstance(await one(store, lease("t2", after=name)), LeaseGranted)


@pytest.mark.parametrize("asked_for", [False, True])
async def test_a_failed_lease_is_nobodys(store: MemcachedStore, *, asked_for: bool) -> None:
    name = await failed(store, "t1")
    assert await one(store, RenewLease("k", name, LONG)) == NotHeld()
    reply = await one(store, Set("k", b"v", LONG, lease=name))
    assert isinstance(reply, NotStored)
    assert reply.reason == "lease_lost"
    # A second release does not remove the error.
    assert await one(store, ReleaseLease("k", "t1" if asked_for else name)) == NotHeld()
    assert told(await one(store, lease("t2", after=name))) == "OSError"
    # A late repetition of the request gets a new lease.
    assert await granted(store, lease("t1")) != name


@pytest.mark.parametrize(
    "loses", [Delete("k"), InvalidateTags(("red",)), Add("k", b"w")], ids=["delete", "tag", "write"]
)
async def test_a_lease_that_was_lost_has_nothing_to_tell(store: MemcachedStore, loses: Request[Any]) -> None:
    name = await granted(store, lease("t1", tags=("red",)))
    await one(store, loses)
    assert await one(store, ReleaseLease("k", name, "OSError")) == NotHeld()
    assert isinstance(await one(store, lease("t2", after=name)), LeaseGranted | Found)


async def test_what_is_stale_is_served_while_the_failure_is_told(store: MemcachedStore) -> None:
    first = await granted(store, lease("t1"))
    await one(store, Set("k", b"old", 5.0, lease=first, metadata=LoadMetadata(0.0, LONG)))
    connection_of(store)._offset += 10.0
    name = await failed(store, "t2")
    assert told(await one(store, lease("t3", after=name))) == "OSError"
    reply = await one(store, lease("t4"))
    assert isinstance(reply, LeaseGranted)
    assert reply.stale is not None
    assert reply.stale.value == b"old"


async def test_it_is_in_nobodys_way(store: MemcachedStore) -> None:
    await failed(store, "t1")
    assert isinstance(await one(store, Add("k", b"v", LONG)), Stored)
    assert (await one(store, Get("k"))).value == b"v"


async def test_the_server_forgets_it_soon(server: Server) -> None:
    async with opened(server) as store:
        await failed(store, "t1")
        assert FAILURE_SHOWN - SECONDS_LATE <= await left(server, store) <= FAILURE_SHOWN + 1
        mine = await granted(store, lease("t2"))
        assert LONG - SECONDS_LATE <= await left(server, store) <= LONG + 1
        await one(store, ReleaseLease("k", mine))
