"""Tests of rate limits: never too many units, and no request is denied while enough units are left."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest

from cachebus.messages import (
    Admit,
    Admitted,
    BadMessage,
    CacheSerializationError,
    CapabilityError,
    Clear,
    Delete,
    DeletePattern,
    Found,
    Get,
    Increment,
    Incremented,
    Missing,
    RateLimitDenied,
    Set,
)

from .base import AnyStore, Conformance, all_keys, ask, carry_out

LONG = 3600.0


class Limiting(Conformance):
    """Tests of the capability `rate_limits`. Part of `StoreConformance`."""

    @pytest.fixture(autouse=True)
    def name_of_its_own(self) -> None:
        """Use a new name in each test, because limits cannot be cleared."""
        self.name = uuid4().hex

    def take(self, cost: int = 1, *, key: str = "", limit: int = 3, per: float = LONG, **more: Any) -> Admit:
        """Return a request for units of a limit that is replenished slowly."""
        return Admit(key or self.name, limit, per, more.pop("burst", limit), cost, **more)

    @pytest.fixture
    def limiting(self, store: AnyStore) -> AnyStore:
        """Provide the store if it supports rate limits."""
        self.needs(store, "rate_limits")
        return store

    async def used_up(self, store: AnyStore, key: str = "") -> bool:
        """Return true if the limit of three units per hour is exhausted."""
        return isinstance(await ask(store, self.take(key=key)), RateLimitDenied)

    async def test_a_store_limits_rates_or_raises_capability_error(self, store: AnyStore) -> None:
        if store.capabilities.rate_limits:
            assert isinstance(await ask(store, self.take()), Admitted)
        else:
            with pytest.raises(CapabilityError):
                await ask(store, self.take())

    async def test_the_burst_is_admitted_and_the_next_is_refused(self, limiting: AnyStore) -> None:
        for left in (2, 1, 0):
            reply = await ask(limiting, self.take())
            assert isinstance(reply, Admitted)
            assert (reply.remaining, reply.delay) == (left, 0.0)
            assert reply.reset_after == pytest.approx((3 - left) * LONG / 3, abs=5)
        refused = await ask(limiting, self.take())
        assert isinstance(refused, RateLimitDenied)
        assert refused.remaining == 0
        assert refused.retry_after == pytest.approx(LONG / 3, abs=5)
        assert refused.reset_after == pytest.approx(LONG, abs=5)

    async def test_units_come_back_with_time_and_no_sooner(self, limiting: AnyStore) -> None:
        per = 40 * self.short_ttl
        for _ in range(2):
            assert isinstance(await ask(limiting, self.take(limit=2, per=per)), Admitted)
        refused = await ask(limiting, self.take(limit=2, per=per))
        assert isinstance(refused, RateLimitDenied)
        assert 0 < refused.retry_after <= per / 2
        await self.elapse(refused.retry_after / 2)
        assert isinstance(await ask(limiting, self.take(limit=2, per=per)), RateLimitDenied)
        await self.elapse(refused.retry_after / 2 + self.slack)
        assert isinstance(await ask(limiting, self.take(limit=2, per=per)), Admitted), "a denied request takes no units"
        assert isinstance(await ask(limiting, self.take(limit=2, per=per)), RateLimitDenied)

    async def test_a_quiet_time_gives_the_burst_and_no_more(self, limiting: AnyStore) -> None:
        per = self.short_ttl
        for _ in range(2):
            await ask(limiting, self.take(limit=1, per=per, burst=2))
        await self.elapse(10 * per)
        replies = await carry_out(limiting, [self.take(limit=1, per=LONG, burst=2)] * 3)
        assert [type(reply) for reply in replies] == [Admitted, Admitted, RateLimitDenied]

    async def test_several_units_are_taken_together_or_not_at_all(self, limiting: AnyStore) -> None:
        assert isinstance(await ask(limiting, self.take(2)), Admitted)
        refused = await ask(limiting, self.take(2))
        assert isinstance(refused, RateLimitDenied)
        assert refused.remaining == 1
        assert isinstance(await ask(limiting, self.take(1)), Admitted)

    async def test_a_burst_of_its_own(self, limiting: AnyStore) -> None:
        replies = await carry_out(limiting, [self.take(limit=1, burst=4)] * 5)
        assert [type(reply) for reply in replies] == [Admitted] * 4 + [RateLimitDenied]
        last = replies[-1]
        assert isinstance(last, RateLimitDenied)
        assert last.retry_after == pytest.approx(LONG, abs=5)

    async def test_in_one_batch_exactly_the_burst_is_admitted(self, limiting: AnyStore) -> None:
        batch = [self.take(limit=50, key=self.name + key) for _ in range(60) for key in ("a", "b")]
        replies = await carry_out(limiting, batch)
        for at in (0, 1):
            assert [type(reply) for reply in replies[at::2]] == [Admitted] * 50 + [RateLimitDenied] * 10

    async def test_units_are_taken_in_advance_in_the_order_of_asking(self, limiting: AnyStore) -> None:
        await carry_out(limiting, [self.take()] * 3)
        delays: list[float] = []
        for _ in range(2):
            reply = await ask(limiting, self.take(wait=LONG))
            assert isinstance(reply, Admitted)
            delays.append(reply.delay)
        assert delays == [pytest.approx(LONG / 3, abs=5), pytest.approx(2 * LONG / 3, abs=5)]
        assert await self.used_up(limiting)
        too_late = await ask(limiting, self.take(wait=LONG / 2))
        assert isinstance(too_late, RateLimitDenied)
        assert too_late.retry_after == pytest.approx(LONG, abs=5)
        assert isinstance(await ask(limiting, self.take(wait=LONG)), Admitted), "a denied request takes no units"

    async def test_limits_are_apart_from_each_other_and_from_values(self, limiting: AnyStore) -> None:
        await carry_out(limiting, [self.take()] * 3)
        assert isinstance(await ask(limiting, self.take(key=self.name + "other")), Admitted)
        assert isinstance(await ask(limiting, Get(self.name)), Missing)
        if limiting.capabilities.patterns:
            assert await all_keys(limiting) == set()
        assert await ask(limiting, Increment(self.name, 5)) == Incremented(5)
        await ask(limiting, Set(self.name, b"v"))
        assert await self.used_up(limiting)
        found = await ask(limiting, Get(self.name))
        assert isinstance(found, Found)
        assert found.value == b"v"

    async def test_nothing_that_removes_values_gives_units_back(self, limiting: AnyStore) -> None:
        await carry_out(limiting, [self.take()] * 3)
        await ask(limiting, Delete(self.name))
        if limiting.capabilities.patterns:
            await ask(limiting, DeletePattern("*"))
        await ask(limiting, Clear())
        assert await self.used_up(limiting)

    async def test_namespaces_have_limits_of_their_own(self, limiting: AnyStore, neighbour: AnyStore) -> None:
        await carry_out(limiting, [self.take()] * 3)
        assert await self.used_up(limiting)
        assert isinstance(await ask(neighbour, self.take(limit=3, burst=1)), Admitted)
        await ask(neighbour, Clear())
        assert await self.used_up(limiting)

    async def test_another_limit_under_the_name_finds_what_is_used(self, limiting: AnyStore) -> None:
        await carry_out(limiting, [self.take()] * 3)
        reply = await ask(limiting, self.take(limit=10, per=2 * LONG))
        assert isinstance(reply, Admitted)
        assert reply.remaining == 6, "three are used, and one more"

    @pytest.mark.parametrize("name", ["a b\r\nc", "n" * 300, "é" * 200, "{x}", "}{", "a:b", "#rate:k", "~", "*"])
    async def test_any_name_will_do(self, limiting: AnyStore, name: str) -> None:
        name += self.name
        replies = await carry_out(limiting, [self.take(key=name)] * 4)
        assert [type(reply) for reply in replies] == [Admitted] * 3 + [RateLimitDenied]
        assert isinstance(await ask(limiting, self.take(key=name + "x")), Admitted)

    async def test_a_high_rate_is_kept_as_exactly_as_a_low_one(self, limiting: AnyStore) -> None:
        await ask(limiting, self.take(10**9, limit=10**9, per=LONG))
        refused = await ask(limiting, self.take(10**8, limit=10**9, per=LONG))
        assert isinstance(refused, RateLimitDenied)
        assert refused.retry_after == pytest.approx(LONG / 10, abs=5)
        assert refused.remaining <= 5 * 10**9 / LONG

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("limit", 0),
            ("limit", -1),
            ("limit", 10**9 + 1),
            ("per", 0.0),
            ("per", -1.0),
            ("per", float("nan")),
            ("per", float("inf")),
            ("burst", 0),
            ("cost", 0),
            ("cost", -1),
            ("cost", 4),
            ("wait", -1.0),
            ("wait", float("nan")),
            ("wait", float("inf")),
            ("per", 1e9),
        ],
    )
    async def test_what_no_limit_can_answer_is_refused_and_changes_nothing(
        self, limiting: AnyStore, field: str, value: float
    ) -> None:
        fields: dict[str, Any] = {"limit": 2, "per": LONG, "burst": 3, "cost": 1, "wait": 0.0, field: value}
        with pytest.raises((BadMessage, CacheSerializationError)):  # JSON has no NaN or infinity.
            await ask(limiting, Admit(self.name, **fields))
        replies = await carry_out(limiting, [self.take()] * 4)
        assert [type(reply) for reply in replies] == [Admitted] * 3 + [RateLimitDenied]
