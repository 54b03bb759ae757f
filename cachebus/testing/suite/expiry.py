"""Tests of times to live: defaults, rounding, and expiry neither too early nor too late."""

from __future__ import annotations

import math

import pytest

from cachebus.messages import (
    Add,
    BadMessage,
    CacheSerializationError,
    Delete,
    Deleted,
    Exists,
    Failed,
    Found,
    Get,
    GetMany,
    Increment,
    Incremented,
    Missing,
    NotStored,
    Present,
    Request,
    Set,
    SetMany,
    Stored,
    Touch,
    Ttl,
)

from .base import MISSING, AnyStore, Conformance, all_keys, ask, carry_out, value_of

DAY = 86_400.0


class Expiry(Conformance):
    """Tests of times to live. Part of `StoreConformance`."""

    async def test_a_value_without_expiry_says_so(self, store: AnyStore) -> None:
        for request in self._writes(None):
            await ask(store, request)
            assert await self._left(store) is None
            await ask(store, Delete("a"))

    async def test_a_value_has_the_time_that_it_was_given(self, store: AnyStore) -> None:
        for request in self._writes(60.0):
            await ask(store, request)
            left = await self._left(store)
            assert left is not None
            assert 0 < left <= self.rounded(store, 60.0)
            await ask(store, Delete("a"))

    async def test_a_value_that_is_given_no_time_has_the_default_of_its_store(self, store: AnyStore) -> None:
        for request in self._writes("default"):
            await ask(store, request)
            left = await self._left(store)
            if self.default_ttl is None:
                assert left is None
            else:
                assert left is not None
                assert 0 < left <= self.rounded(store, self.default_ttl)
            await ask(store, Delete("a"))

    @pytest.mark.parametrize("ttl", [0.0, -1.0, -math.inf, math.nan, math.inf])
    async def test_an_invalid_time_to_live_is_refused_without_side_effects(self, store: AnyStore, ttl: float) -> None:
        await ask(store, Set("there", b"1"))
        touch = Touch("there", ttl=ttl)
        for request in (*self._writes(ttl), touch):
            before, reply, after = await carry_out(store, [Get("there"), request, Get("there")])
            assert isinstance(before, Found)
            assert isinstance(after, Found)
            if ttl != math.inf or request is touch:
                assert isinstance(reply, Failed)
                assert isinstance(reply.error(), BadMessage | CacheSerializationError)  # JSON has no NaN or infinity.
            elif not isinstance(reply, Failed):
                assert await self._left(store) is None, "an accepted infinite ttl means no expiry"
                await ask(store, Delete("a"))
            assert await value_of(store, "a") is MISSING

    async def test_forty_days_are_forty_days(self, store: AnyStore) -> None:
        # Memcached interprets more than 30 days as a Unix time.
        await ask(store, Set("a", b"1", ttl=40 * DAY))
        assert await value_of(store, "a") == b"1"
        left = await self._left(store)
        assert left is not None
        assert 39 * DAY < left <= self.rounded(store, 40 * DAY)

    async def test_a_value_goes_when_its_time_is_up_whatever_asks(self, store: AnyStore) -> None:
        await ask(store, Set("a", b"1", ttl=self.short_ttl))
        await ask(store, Set("stays", b"2", ttl=3600.0))
        await self.vanishes(store, "a")
        assert await ask(store, Get("a")) == Missing()
        assert set((await ask(store, GetMany(("a", "stays")))).entries) == {"stays"}
        assert await ask(store, Set("a", b"2", only_if="present")) == NotStored(0.0)
        assert await ask(store, Touch("a", 60.0)) == Missing()
        assert await ask(store, Delete("a")) == Deleted(0)
        if store.capabilities.patterns:
            assert await all_keys(store) == {"stays"}
        assert isinstance(await ask(store, Add("a", b"3")), Stored)
        assert await value_of(store, "stays") == b"2"

    async def test_many_values_written_at_once_go_together(self, store: AnyStore) -> None:
        await ask(store, SetMany({"a": b"1", "b": b"2"}, ttl=self.short_ttl))
        await self.vanishes(store, "a")
        await self.vanishes(store, "b")

    async def test_a_value_never_goes_before_its_time(self, store: AnyStore) -> None:
        seen = 0
        for number in range(20):
            before = self.now()
            await ask(store, Set(f"k{number}", b"1", ttl=self.short_ttl))
            await self.elapse(self.short_ttl / 4)
            value = await value_of(store, f"k{number}")
            # On a busy machine the value may really have expired. Then skip this round.
            if self.now() - before < self.short_ttl - self.slack:
                assert value == b"1"
                seen += 1
        assert seen, "the machine was too busy for any observation"

    async def test_a_time_that_the_store_cannot_hold_is_rounded_up(self, store: AnyStore) -> None:
        await ask(store, Set("a", b"1", ttl=self.short_ttl))
        present = await ask(store, Exists("a"))
        if isinstance(present, Present):
            assert present.ttl is not None
            assert 0 < present.ttl <= self.rounded(store, self.short_ttl)
        await self.vanishes(store, "a")

    async def test_a_new_value_has_a_new_time(self, store: AnyStore) -> None:
        await ask(store, Set("a", b"1", ttl=self.short_ttl))
        await ask(store, Set("a", b"2", ttl=None))
        await ask(store, Set("b", b"1", ttl=self.short_ttl))
        await self.vanishes(store, "b")
        assert await value_of(store, "a") == b"2"
        assert await self._left(store) is None

    async def test_touch_gives_a_new_time_and_leaves_the_value(self, store: AnyStore) -> None:
        stored = await ask(store, Set("a", b"1", ttl=60.0))
        assert isinstance(stored, Stored)
        touched = await ask(store, Touch("a", 3600.0))
        assert isinstance(touched, Present)
        assert touched.version == stored.version
        assert touched.ttl is not None
        assert 60.0 < touched.ttl <= self.rounded(store, 3600.0)
        assert await ask(store, Touch("a", None)) == Present(stored.version, None)
        await ask(store, Touch("a", self.short_ttl))
        await self.vanishes(store, "a")

    async def test_touching_a_missing_key_makes_none(self, store: AnyStore) -> None:
        assert await ask(store, Touch("a", 60.0)) == Missing()
        assert await value_of(store, "a") is MISSING

    def rounded(self, store: AnyStore, ttl: float) -> float:
        """Return the longest time to live to which the store may round `ttl`."""
        step = store.capabilities.ttl_resolution
        # If the store declares no resolution, assume the millisecond that servers use.
        return math.ceil(ttl / step) * step if step else ttl + 0.001

    def _writes(self, ttl: Ttl) -> list[Request[object]]:
        writes: list[Request[object]] = [
            Set("a", b"1", ttl),
            Set("a", b"1", ttl, only_if="absent"),
            Add("a", b"1", ttl),
            SetMany({"a": b"1"}, ttl),
        ]
        return writes

    async def _left(self, store: AnyStore) -> float | None:
        """Return the remaining time to live of the key `a`, and check that all requests agree on it."""
        found = await ask(store, Get("a"))
        present = await ask(store, Exists("a"))
        assert isinstance(found, Found)
        assert isinstance(present, Present)
        assert (found.ttl is None) == (present.ttl is None)
        return found.ttl


class Counting(Expiry):
    """Tests of counters and their time to live. Part of `StoreConformance`."""

    async def test_a_counter_counts(self, store: AnyStore) -> None:
        self.needs(store, "counters")
        counted = [await ask(store, Increment("a", delta, initial=10)) for delta in (1, 5, -20, 0)]
        assert counted == [Incremented(11), Incremented(16), Incremented(-4), Incremented(-4)]
        assert await value_of(store, "a") == -4

    async def test_an_integer_that_was_stored_can_be_counted_on(self, store: AnyStore) -> None:
        self.needs(store, "counters")
        await ask(store, Set("a", 41))
        await ask(store, Increment("a"))
        assert await value_of(store, "a") == 42

    async def test_a_counter_that_may_not_begin_stays_missing(self, store: AnyStore) -> None:
        self.needs(store, "counters")
        assert await ask(store, Increment("a", initial=None)) == Missing()
        assert await value_of(store, "a") is MISSING

    async def test_a_new_counter_has_the_time_of_its_first_count_and_keeps_it(self, store: AnyStore) -> None:
        self.needs(store, "counters")
        await ask(store, Increment("a", ttl=60.0))
        await ask(store, Increment("a", ttl=3600.0))
        left = await self._left(store)
        assert left is not None
        assert 0 < left <= self.rounded(store, 60.0)
        await ask(store, Increment("b", ttl=None))
        await ask(store, Increment("b", ttl=self.short_ttl))
        present = await ask(store, Exists("b"))
        assert isinstance(present, Present)
        assert present.ttl is None

    async def test_an_expired_counter_starts_again(self, store: AnyStore) -> None:
        self.needs(store, "counters")
        await ask(store, Increment("a", 5, ttl=self.short_ttl))
        await self.vanishes(store, "a")
        assert await ask(store, Increment("a")) == Incremented(1)

    async def test_counting_makes_a_new_version(self, store: AnyStore) -> None:
        self.needs(store, "counters")
        await ask(store, Increment("a"))
        first = await ask(store, Exists("a"))
        await ask(store, Increment("a"))
        second = await ask(store, Exists("a"))
        assert isinstance(first, Present)
        assert isinstance(second, Present)
        assert second.version > first.version
