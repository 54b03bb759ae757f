"""TTLs computed from the value."""

from __future__ import annotations

from typing import Any

import pytest

from ..clock import ManualClock
from ..facade.faces import a_cache


def ttl_of(value: Any) -> float | None:
    return {"short": 10.0, "no expiry": None}.get(value, 100.0)


async def test_a_ttl_may_depend_on_the_value() -> None:
    async with a_cache(clock=ManualClock()) as cache:
        for value, expected in (("short", 10.0), ("no expiry", None), ("other", 100.0), (None, 5.0)):
            await cache.get_or_load(f"k {value}", lambda value=value: value, ttl=ttl_of, negative_ttl=5)
            assert await cache.ttl(f"k {value}") == expected

        @cache.cached(key="echo {word}", ttl=ttl_of)
        async def echo(word: str) -> str:
            return word

        assert await echo("short") == "short"
        assert await cache.ttl("echo short") == 10.0
        await cache.get_or_load_many(["a", "short"], lambda keys: {each: each for each in keys}, ttl=ttl_of)
        assert (await cache.ttl("a"), await cache.ttl("short")) == (100.0, 10.0)


async def test_a_ttl_that_makes_no_sense_is_the_loaders_failure() -> None:
    async with a_cache() as cache:
        wrong: list[Any] = [lambda _: 0, lambda _: "long", lambda value: value.missing]
        for ttl in wrong:
            with pytest.raises((ValueError, TypeError, AttributeError)):
                await cache.get_or_load("k", lambda: 1, ttl=ttl)
        assert not await cache.exists("k")
        with pytest.raises(ValueError, match="idle_ttl"):
            await cache.get_or_load("k", lambda: 1, ttl=ttl_of, idle_ttl=5)
