"""Tests of leases: one caller loads, and a value that was invalidated during its load is not stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from cachebus.actors.ports import InlineStore
from cachebus.messages import (
    Add,
    CacheSerializationError,
    CapabilityError,
    Clear,
    CompareAndSet,
    Delete,
    DeleteMany,
    DeletePattern,
    Exists,
    Found,
    Get,
    GetMany,
    GetOrLease,
    Increment,
    LeaseGranted,
    Loaded,
    Loading,
    LoadMetadata,
    Missing,
    NotHeld,
    NotStored,
    Released,
    ReleaseLease,
    Renewed,
    RenewLease,
    Request,
    Set,
    SetMany,
    Stale,
    Stored,
    Touch,
)

from .base import AnyStore, Conformance, ask, granted, value_of

LONG = 60.0


def lease(token: str, *, key: str = "k", ttl: float = LONG, refresh: bool = False) -> GetOrLease:
    """Return a process's request for a lease."""
    return GetOrLease(key, f"owner of {token}", token, ttl, refresh=refresh)


def commit(token: str, value: Any, *, key: str = "k", **more: Any) -> Set:
    """Return a process's request to store a value under its lease."""
    return Set(key, value, lease=token, **more)


REVOKING: dict[str, Callable[[], Request[Any]]] = {
    "delete": lambda: Delete("k"),
    "delete many": lambda: DeleteMany(("j", "k")),
    "delete pattern": lambda: DeletePattern("k*"),
    "clear": Clear,
    "set": lambda: Set("k", b"another"),
    "set many": lambda: SetMany({"k": b"another"}),
    "add": lambda: Add("k", b"another"),
    "increment": lambda: Increment("k"),
}
"""Requests that make a value that is being loaded outdated, and so revoke the lease."""


class Leasing(Conformance):
    """Tests of the capability `leases`. Part of `StoreConformance`."""

    @pytest.fixture
    def leasing(self, store: AnyStore) -> AnyStore:
        """Provide the store if it supports leases."""
        self.needs(store, "leases")
        return store

    async def invalidate(self, store: AnyStore, how: str) -> None:
        """Make the value outdated by the request `how`, if the store supports it."""
        if how == "delete pattern":
            self.needs(store, "patterns")
        await ask(store, REVOKING[how]())

    async def store_stale(self, store: AnyStore, stale_for: float) -> bool:
        """Store a value that may be served stale. Return false if `stale_for` cannot be encoded as JSON."""
        t1 = await granted(store, lease("t1"))
        try:
            reply = await ask(store, commit(t1, b"old", ttl=self.short_ttl, metadata=LoadMetadata(0.5, stale_for)))
        except CacheSerializationError:
            assert not math.isfinite(stale_for)
            return False
        assert isinstance(reply, Stored)
        return True

    async def test_a_store_leases_or_raises_capability_error(self, store: AnyStore) -> None:
        if store.capabilities.leases:
            assert isinstance(await ask(store, lease("t1")), LeaseGranted)
        else:
            with pytest.raises(CapabilityError):
                await ask(store, lease("t1"))

    async def test_one_caller_gets_the_lease_and_the_others_its_name(self, leasing: AnyStore) -> None:
        t1 = await granted(leasing, lease("t1"))
        for token in ("t2", "t3"):
            reply = await ask(leasing, lease(token))
            assert isinstance(reply, Loading)
            assert reply.token == t1
            assert 0 < reply.remaining <= LONG
        assert await granted(leasing, lease("t1")) == t1, "asked for twice, granted twice"
        assert isinstance(await ask(leasing, lease("t4", key="other")), LeaseGranted)

    async def test_a_leased_key_has_no_value(self, leasing: AnyStore) -> None:
        t1 = await granted(leasing, lease("t1"))
        assert isinstance(await ask(leasing, Get("k")), Missing)
        assert (await ask(leasing, GetMany(("k",)))).entries == {}
        assert isinstance(await ask(leasing, Exists("k")), Missing)
        assert isinstance(await ask(leasing, Touch("k", ttl=LONG)), Missing)
        assert isinstance(await ask(leasing, Set("k", b"v", only_if="present")), NotStored)
        assert isinstance(await ask(leasing, Increment("k", initial=None)), Missing)
        assert isinstance(await ask(leasing, commit(t1, b"v")), Stored)

    async def test_what_is_loaded_is_stored_and_ends_the_lease(self, leasing: AnyStore) -> None:
        t1 = await granted(leasing, lease("t1"))
        stored = await ask(leasing, commit(t1, b"v", ttl=LONG))
        assert isinstance(stored, Stored)
        found = await ask(leasing, lease("t2"))
        assert isinstance(found, Found)
        assert (found.value, found.version) == (b"v", stored.version)
        assert found.ttl is not None
        assert found.ttl == pytest.approx(LONG, abs=5.0)
        again = await ask(leasing, commit(t1, b"again"))
        assert isinstance(again, NotStored)
        assert again.reason == "lease_lost"
        assert await value_of(leasing, "k") == b"v"

    async def test_another_caller_cannot_store_under_the_lease(self, leasing: AnyStore) -> None:
        await granted(leasing, lease("t1"))
        for token in ("t1", "t2", await granted(leasing, lease("t3", key="another"))):
            assert isinstance(await ask(leasing, commit(token, b"v")), NotStored), token
        refused = await ask(leasing, commit("t2", b"v"))
        assert isinstance(refused, NotStored)
        assert refused.reason == "lease_lost"
        assert isinstance(await ask(leasing, commit("never asked for", b"v", key="other")), NotStored)
        assert isinstance(await ask(leasing, Get("k")), Missing)

    @pytest.mark.parametrize("how", ["delete", "delete many", "delete pattern", "clear"])
    @pytest.mark.parametrize("refresh", [False, True])
    async def test_a_lease_that_is_granted_again_after_a_revocation_is_another_lease(
        self, leasing: AnyStore, how: str, refresh: bool
    ) -> None:
        """A delayed request, of which another copy was answered long ago, may be carried out after an invalidation."""
        if refresh:
            await ask(leasing, Set("k", b"old", ttl=LONG))
        first = await granted(leasing, lease("t1", refresh=refresh))
        await self.invalidate(leasing, how)
        second = await granted(leasing, lease("t1", refresh=refresh))
        assert second != first
        assert isinstance(await ask(leasing, commit(first, b"out of date")), NotStored)
        assert isinstance(await ask(leasing, RenewLease("k", first, LONG)), NotHeld)
        assert isinstance(await ask(leasing, ReleaseLease("k", first)), NotHeld)
        assert isinstance(await ask(leasing, Get("k")), Missing)
        reply = await ask(leasing, lease("t2"))
        assert isinstance(reply, Loading)
        assert reply.token == second
        assert isinstance(await ask(leasing, commit(second, b"new")), Stored)

    @pytest.mark.parametrize("refresh", [False, True])
    async def test_a_lease_can_be_released_with_the_token_of_its_request(
        self, leasing: AnyStore, refresh: bool
    ) -> None:
        if refresh:
            await ask(leasing, Set("k", b"old", ttl=LONG))
        t1 = await granted(leasing, lease("t1", refresh=refresh))
        assert isinstance(await ask(leasing, ReleaseLease("k", "t2")), NotHeld)
        assert isinstance(await ask(leasing, ReleaseLease("k", "t1")), Released)
        assert isinstance(await ask(leasing, commit(t1, b"v")), NotStored)
        await granted(leasing, lease("t2", refresh=refresh))

    @pytest.mark.parametrize("how", REVOKING)
    async def test_what_is_invalidated_during_the_load_is_not_stored(self, leasing: AnyStore, how: str) -> None:
        t1 = await granted(leasing, lease("t1"))
        await self.invalidate(leasing, how)
        before = await ask(leasing, Get("k"))
        refused = await ask(leasing, commit(t1, b"out of date"))
        assert isinstance(refused, NotStored)
        assert refused.reason == "lease_lost"
        after = await ask(leasing, Get("k"))
        assert isinstance(after, Found) == isinstance(before, Found)
        if isinstance(after, Found) and isinstance(before, Found):
            assert after.version == before.version
        else:
            assert isinstance(await ask(leasing, lease("t2")), LeaseGranted), "the next may load at once"

    @pytest.mark.parametrize("how", [each for each in REVOKING if each not in ("add", "increment")])
    async def test_a_reload_of_a_live_value_is_guarded_as_well(self, leasing: AnyStore, how: str) -> None:
        await ask(leasing, Set("k", b"old", ttl=LONG))
        t1 = await granted(leasing, lease("t1", refresh=True))
        assert await value_of(leasing, "k") == b"old", "it is read meanwhile"
        await self.invalidate(leasing, how)
        before = await value_of(leasing, "k")
        refused = await ask(leasing, commit(t1, b"out of date"))
        assert isinstance(refused, NotStored)
        assert await value_of(leasing, "k") == before

    async def test_a_live_value_is_reloaded_by_one_caller(self, leasing: AnyStore) -> None:
        await ask(leasing, Set("k", b"old", ttl=LONG))
        assert isinstance(await ask(leasing, lease("t1")), Found)
        t1 = await granted(leasing, lease("t1", refresh=True))
        assert isinstance(await ask(leasing, lease("t2", refresh=True)), Found)
        assert isinstance(await ask(leasing, commit("t2", b"no")), NotStored)
        assert isinstance(await ask(leasing, commit(t1, b"new")), Stored)
        assert await value_of(leasing, "k") == b"new"
        found = await ask(leasing, Get("k"))
        assert isinstance(found, Found)
        assert isinstance(await ask(leasing, CompareAndSet("k", b"newer", found.version)), Stored)

    async def test_a_released_lease_goes_to_the_next_caller(self, leasing: AnyStore) -> None:
        t1 = await granted(leasing, lease("t1"))
        assert isinstance(await ask(leasing, ReleaseLease("k", "t2")), NotHeld), "not by another caller"
        assert isinstance(await ask(leasing, lease("t2")), Loading)
        assert isinstance(await ask(leasing, ReleaseLease("k", t1, "LookupError")), Released)
        assert isinstance(await ask(leasing, ReleaseLease("k", t1)), NotHeld)
        assert isinstance(await ask(leasing, lease("t2")), LeaseGranted)
        assert isinstance(await ask(leasing, commit(t1, b"v")), NotStored)

    async def test_a_lease_runs_out_unless_it_is_renewed(self, leasing: AnyStore) -> None:
        time_to_renew = 10 * self.short_ttl  # Enough for two requests even on a busy machine.
        t1 = await granted(leasing, lease("t1", ttl=time_to_renew))
        assert isinstance(await ask(leasing, RenewLease("k", "t2", LONG)), NotHeld)
        assert await ask(leasing, RenewLease("k", t1, LONG)) == Renewed(LONG)
        await self.elapse(time_to_renew + self.slack)
        assert isinstance(await ask(leasing, lease("t2")), Loading)
        await ask(leasing, RenewLease("k", t1, self.short_ttl))
        await self.elapse(self.short_ttl + self.slack)
        assert isinstance(await ask(leasing, RenewLease("k", t1, LONG)), NotHeld)
        t2 = await granted(leasing, lease("t2"))
        late = await ask(leasing, commit(t1, b"late"))
        assert isinstance(late, NotStored)
        assert isinstance(await ask(leasing, commit(t2, b"v")), Stored)

    async def test_a_loaded_value_keeps_its_origin(self, leasing: AnyStore) -> None:
        t1 = await granted(leasing, lease("t1"))
        await ask(leasing, commit(t1, [1, "a"], ttl=LONG, metadata=LoadMetadata(0.25, 5.0, "v1")))
        for found in (await ask(leasing, Get("k")), await ask(leasing, lease("t2"))):
            assert isinstance(found, Loaded)
            assert found.value == [1, "a"]
            assert (found.load_time, found.stale_for, found.etag, found.lifetime) == (0.25, 5.0, "v1", LONG)
            assert found.ttl is not None
            assert found.ttl == pytest.approx(LONG, abs=5.0)
        assert (await ask(leasing, GetMany(("k",)))).entries["k"].value == [1, "a"]
        await ask(leasing, Set("k", b"plain"))
        assert type(await ask(leasing, Get("k"))) is Found

    async def test_a_value_whose_time_is_up_may_be_served_stale_and_is_no_hit(self, leasing: AnyStore) -> None:
        t1 = await granted(leasing, lease("t1"))
        stored = await ask(leasing, commit(t1, b"old", ttl=self.short_ttl, metadata=LoadMetadata(0.5, LONG, "v1")))
        assert isinstance(stored, Stored)
        await self.expire(leasing)
        assert isinstance(await ask(leasing, Get("k")), Missing)
        assert isinstance(await ask(leasing, Exists("k")), Missing)
        assert isinstance(await ask(leasing, Touch("k", ttl=LONG)), Missing)
        mine = await ask(leasing, lease("t2"))
        assert isinstance(mine, LeaseGranted)
        reply = await ask(leasing, lease("t3"))
        for stale in (mine.stale, reply):
            assert isinstance(stale, Stale)
            assert (stale.value, stale.version, stale.load_time, stale.etag) == (b"old", stored.version, 0.5, "v1")
        assert isinstance(reply, Stale)
        assert reply.lease == mine.token
        await ask(leasing, ReleaseLease("k", mine.token))
        again = await ask(leasing, lease("t4"))
        assert isinstance(again, LeaseGranted)
        assert again.stale is not None, "it remains after a failed load"
        new = await ask(leasing, commit(again.token, b"new"))
        assert isinstance(new, Stored)
        assert new.version > stored.version

    @pytest.mark.parametrize("how", ["delete", "delete many", "delete pattern", "clear"])
    @pytest.mark.parametrize("during", ["before a load", "during a load"])
    async def test_what_was_removed_is_not_served_stale(self, leasing: AnyStore, how: str, during: str) -> None:
        t1 = await granted(leasing, lease("t1"))
        await ask(leasing, commit(t1, b"old", ttl=self.short_ttl, metadata=LoadMetadata(0.5, LONG)))
        await self.expire(leasing)
        if during == "during a load":
            await granted(leasing, lease("t2"))
        await self.invalidate(leasing, how)
        t3 = await granted(leasing, lease("t3"))
        assert await ask(leasing, lease("t3")) == LeaseGranted(t3, None)

    async def test_a_stale_value_is_gone_when_its_time_is_up_too(self, leasing: AnyStore) -> None:
        t1 = await granted(leasing, lease("t1"))
        metadata = LoadMetadata(0.5, self.short_ttl)
        await ask(leasing, commit(t1, b"old", ttl=self.short_ttl, metadata=metadata))
        await self.expire(leasing, times=2)
        t2 = await granted(leasing, lease("t2"))
        assert await ask(leasing, lease("t2")) == LeaseGranted(t2, None)

    @pytest.mark.parametrize("stale_for", [1e9, 1e18, math.inf])
    async def test_what_may_be_served_stale_for_ages_is_kept(self, leasing: AnyStore, stale_for: float) -> None:
        if not await self.store_stale(leasing, stale_for):
            return
        await ask(leasing, Set("other", b"v", ttl=self.short_ttl))
        await self.expire(leasing, times=2)
        if isinstance(leasing, InlineStore):
            leasing.sweep(100)
        assert isinstance(await ask(leasing, Get("k")), Missing)
        assert isinstance(await ask(leasing, Get("other")), Missing)
        reply = await ask(leasing, lease("t2"))
        assert isinstance(reply, LeaseGranted)
        assert reply.stale is not None
        assert reply.stale.value == b"old"

    @pytest.mark.parametrize("stale_for", [-1.0, -math.inf, math.nan])
    async def test_for_less_than_no_time_is_not_at_all(self, leasing: AnyStore, stale_for: float) -> None:
        if not await self.store_stale(leasing, stale_for):
            return
        await self.expire(leasing)
        reply = await ask(leasing, lease("t2"))
        assert isinstance(reply, LeaseGranted)
        assert reply.stale is None

    async def test_a_value_may_be_added_in_the_place_of_a_stale_one(self, leasing: AnyStore) -> None:
        t1 = await granted(leasing, lease("t1"))
        await ask(leasing, commit(t1, b"old", ttl=self.short_ttl, metadata=LoadMetadata(0.5, LONG)))
        await self.expire(leasing)
        assert isinstance(await ask(leasing, Set("k", b"no", only_if="present")), NotStored)
        assert isinstance(await ask(leasing, Add("k", b"new")), Stored)
        assert await value_of(leasing, "k") == b"new"
