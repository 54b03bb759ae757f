"""Options of `get_or_load`. Each of these tests fails if its option is ignored."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from cachebus import Cache, CacheError, Found, LoadContext, LoadResult
from cachebus.loading.options import LoadOptions
from cachebus.messages import Get, Loaded, LoadSucceeded, RenewLease

from ..clock import ManualClock
from ..facade.faces import heard
from .slow import Slow


class Counting:
    """Loader that returns its number of calls, after a delay on the test clock."""

    def __init__(self, clock: ManualClock | None = None, takes: float = 0.0) -> None:
        self.calls = 0
        self.contexts: list[LoadContext] = []
        self._clock = clock
        self._takes = takes

    async def __call__(self, context: LoadContext) -> Any:
        self.calls += 1
        self.contexts.append(context)
        if self._clock is not None:
            self._clock.advance(self._takes)
        return self.calls


async def until(value: Any, cache: Cache, key: str = "k") -> None:
    with anyio.fail_after(30):
        while await cache.get(key) != value:
            await checkpoint()


async def test_ttl_and_tags(cache: Cache) -> None:
    await cache.get_or_load("k", lambda: 1, ttl=timedelta(seconds=7), tags=["a", "b", "a"])
    found = await cache.lookup("k")
    assert isinstance(found, Found)
    assert (found.ttl, found.tags) == (7.0, ("a", "b"))


@pytest.mark.parametrize("options", [{"refresh": 0.5}, {"refresh_after": 5}, {"refresh": "xfetch"}])
async def test_refresh_loads_a_live_value_anew_beside_whoever_reads_it(
    cache: Cache, clock: ManualClock, options: dict[str, Any]
) -> None:
    load = Counting(clock, takes=1.0)
    await cache.get_or_load("k", load, ttl=10, **options)
    clock.advance(4)
    cache.loads.table.random = random.Random(1)  # xfetch: 1 s * -ln(1 - 0.13) is far from the 6 s that are left
    assert await cache.get_or_load("k", load, ttl=10, **options) == 1
    await anyio.wait_all_tasks_blocked()
    assert load.calls == 1, "too early"
    clock.advance(5.999)
    assert await cache.get_or_load("k", load, ttl=10, **options) == 1, "the old one, at once"
    await until(2, cache)
    assert load.contexts[1].stale == 1
    assert await cache.ttl("k") == 10.0


def test_xfetch_refreshes_as_often_as_its_formula_says() -> None:
    found = Loaded(1, ttl=1.0, lifetime=60.0, load_time=0.4)
    for beta, expected in ((1.0, 0.082), (2.0, 0.287)):
        options = LoadOptions.of(refresh="xfetch", beta=beta)
        chance = random.Random(3)
        share = sum(options.wants_refresh(found, chance) for _ in range(20_000)) / 20_000
        assert share == pytest.approx(expected, abs=0.01), "P = exp(-left / (beta * load time))"


async def test_many_readers_of_a_value_that_is_due_refresh_it_once(cache: Cache, clock: ManualClock) -> None:
    load = Counting()
    await cache.get_or_load("k", load, ttl=10, refresh=0.5)
    clock.advance(6)
    async with anyio.create_task_group() as tasks:
        for _ in range(50):
            tasks.start_soon(lambda: cache.get_or_load("k", load, ttl=10, refresh=0.5))
    await until(2, cache)
    assert load.calls == 2


async def test_a_refresh_that_fails_leaves_the_value(cache: Cache, clock: ManualClock) -> None:
    await cache.get_or_load("k", lambda: 1, ttl=10, refresh=0.5)
    clock.advance(6)

    def fail() -> None:
        raise LookupError

    assert await cache.get_or_load("k", fail, ttl=10, refresh=0.5) == 1
    with anyio.fail_after(30):
        while cache.loads.table.refreshing:
            await checkpoint()
    assert await cache.get("k") == 1


async def test_negative_ttl_is_that_of_none(cache: Cache) -> None:
    assert await cache.get_or_load("none", lambda: None, ttl=60, negative_ttl=5) is None
    assert await cache.get_or_load("some", lambda: 0, ttl=60, negative_ttl=5) == 0
    assert (await cache.ttl("none"), await cache.ttl("some")) == (5.0, 60.0)


async def test_ttl_jitter_takes_off_a_part(cache: Cache) -> None:
    for number in range(50):
        await cache.get_or_load(f"k{number}", lambda: 1, ttl=100, ttl_jitter=0.2)
    times = [await cache.ttl(f"k{number}") for number in range(50)]
    assert all(each is not None and 80 <= each <= 100 for each in times)
    assert len(set(times)) > 40


async def test_idle_ttl_lets_a_value_live_while_it_is_asked_for_but_not_for_ever(
    cache: Cache, clock: ManualClock
) -> None:
    load = Counting()
    options: dict[str, Any] = {"ttl": 25, "idle_ttl": 10}
    assert await cache.get_or_load("k", load, **options) == 1
    assert await cache.ttl("k") == 10.0
    for _ in range(4):
        clock.advance(6)
        assert await cache.get_or_load("k", load, **options) == 1
    assert await cache.ttl("k") == 1.0, "24 s have passed, and 25 are the most"
    clock.advance(1)
    assert await cache.get_or_load("k", load, **options) == 2
    clock.advance(10)
    assert await cache.get_or_load("k", load, **options) == 3, "no request for 10 s"


async def test_what_is_cached_of_none_ends_in_its_own_time_however_often_it_is_asked_for(
    cache: Cache, clock: ManualClock
) -> None:
    calls = 0

    def load() -> None:
        nonlocal calls
        calls += 1

    for _ in range(20):
        await cache.get_or_load("k", load, ttl=3600, idle_ttl=4, negative_ttl=10)
        clock.advance(3)
    assert calls == 5, "one load per 12 s in 60 s: the first request after 10 s"
    with pytest.raises(ValueError, match="a LoadResult must not set a ttl if the call has idle_ttl"):
        await cache.get_or_load("own", lambda: LoadResult("value", ttl=5), ttl=3600, idle_ttl=4)


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
async def test_a_jump_of_the_wall_clock_changes_nothing(cache: Cache, clock: ManualClock, jump: float) -> None:
    slow = Slow()

    load = Counting()
    sliding: dict[str, Any] = {"ttl": 25, "idle_ttl": 10}
    await cache.get_or_load("sliding", load, **sliding)
    await cache.get_or_load("due", load, ttl=10, refresh=0.5, stale_for=60)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: cache.get_or_load("slow", slow, ttl=60, lease_ttl=3))
        await slow.begun.wait()
        clock.jump(jump)
        slow.go_on.set()
    assert await cache.ttl("slow") == 60.0, "stored: its lease was held"
    assert await cache.get_or_load("due", load, ttl=10, refresh=0.5) == 2, "not due"
    for _ in range(4):
        clock.advance(6)
        assert await cache.get_or_load("sliding", load, **sliding) == 1
    assert await cache.ttl("sliding") == 1.0, "24 s have passed, and 25 are the most"
    assert load.calls == 2


async def test_a_decorated_function_takes_the_same_options(cache: Cache, clock: ManualClock) -> None:
    calls = 0

    @cache.cached(key="k", ttl=25, idle_ttl=10, stale_for=50)
    async def load() -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise LookupError
        return calls

    assert await load() == 1
    clock.advance(6)
    assert await load() == 1
    assert await cache.ttl("k") == 10.0
    clock.advance(10)
    assert await load() == 1, "served stale"
    assert calls == 2


async def test_a_loader_decides_how_its_value_is_kept(cache: Cache, clock: ManualClock) -> None:
    await cache.get_or_load("k", lambda: LoadResult(1, ttl=3, tags=["more"]), ttl=60, tags=["t"])
    found = await cache.lookup("k")
    assert isinstance(found, Found)
    assert (found.ttl, found.tags) == (3.0, ("t", "more"))
    assert await cache.get_or_load("not kept", lambda: LoadResult(2, store=False)) == 2
    assert await cache.get("not kept") is None
    await cache.get_or_load("stale", lambda: LoadResult(3, ttl=1, stale_for=9))
    clock.advance(5)

    def fail() -> None:
        raise LookupError

    assert await cache.get_or_load("stale", fail) == 3


async def test_a_loader_may_say_that_nothing_has_changed(cache: Cache, clock: ManualClock) -> None:
    contexts: list[LoadContext] = []

    async def load(context: LoadContext) -> LoadResult:
        contexts.append(context)
        return LoadResult.not_modified() if context.etag == "v1" else LoadResult("body", etag="v1")

    for _ in range(3):
        assert await cache.get_or_load("k", load, ttl=10, stale_for=60) == "body"
        clock.advance(10)
    assert [context.etag for context in contexts] == [None, "v1", "v1"]
    assert [context.stale for context in contexts] == [None, "body", "body"]
    with pytest.raises(CacheError, match=r"not_modified\(\), but there is no existing value"):
        await cache.get_or_load("other", LoadResult.not_modified)


@pytest.mark.parametrize("later", [6, 10], ids=["refreshed while it lives", "stale"])
async def test_what_has_not_changed_keeps_the_tags_that_its_loader_gave_it(
    cache: Cache, clock: ManualClock, later: float
) -> None:
    contexts: list[LoadContext] = []

    async def load(context: LoadContext) -> LoadResult:
        contexts.append(context)
        return LoadResult.not_modified() if context.has_stale else LoadResult("body", tags=["team:7"])

    options: dict[str, Any] = {"ttl": 10, "stale_for": 60, "refresh": 0.5, "tags": ["users"]}
    await cache.get_or_load("k", load, **options)
    clock.advance(later)
    await cache.get_or_load("k", load, **options)
    await anyio.wait_all_tasks_blocked()
    assert [each.stale_tags for each in contexts] == [(), ("users", "team:7")]
    found = await cache.lookup("k")
    assert isinstance(found, Found)
    assert found.ttl == 10
    await cache.invalidate_tags("team:7")
    assert await cache.get("k") is None


async def test_a_loader_knows_until_when_somebody_waits(cache: Cache, clock: ManualClock) -> None:
    load = Counting()
    await cache.get_or_load("k", load, hard_timeout=3)
    await cache.get_or_load("l", load)
    assert [context.deadline for context in load.contexts] == [clock.monotonic() + 3, None]


async def test_a_lease_is_renewed_for_as_long_as_its_load_runs(cache: Cache, clock: ManualClock) -> None:
    load = Slow()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: cache.get_or_load("k", load, lease_ttl=3))
        await load.begun.wait()
        for _ in range(10):
            await anyio.wait_all_tasks_blocked()
            clock.advance(1)
        await anyio.wait_all_tasks_blocked()
        load.go_on.set()
    assert await cache.get("k") == "value", "stored, though the load took more than three leases"
    assert len(cache.loads.table.renewals) == 0


async def test_a_lease_that_is_not_renewed_is_lost_after_its_time(cache: Cache, clock: ManualClock) -> None:
    async def load() -> str:
        cache.loads.table.renewals.untrack(next(iter(cache.loads.table.in_flight)))
        clock.advance(3)
        return "value"

    assert await cache.get_or_load("k", load, lease_ttl=3) == "value"
    assert await cache.get("k") is None


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"stale_for": -1}, ValueError, r"stale_for must be from 0 to 1e\+09 seconds, not -1"),
    ({"stale_for": "5"}, TypeError, "stale_for must be seconds or a timedelta, not '5'"),
    ({"stale_for": None}, TypeError, "stale_for must be seconds or a timedelta, not None"),
    ({"hard_timeout": 0}, ValueError, r"hard_timeout must be above 0 and at most 1e\+09 seconds, not 0"),
    ({"hard_timeout": 10**400}, ValueError, "hard_timeout must be above 0"),
    ({"soft_timeout": float("inf")}, ValueError, "soft_timeout must be from 0"),
    ({"soft_timeout": float("nan")}, ValueError, "soft_timeout must be from 0"),
    ({"soft_timeout": True}, TypeError, "soft_timeout must be seconds or a timedelta, not True"),
    ({"refresh": "soon"}, ValueError, "refresh must be 'xfetch' or a fraction"),
    ({"refresh": 1.5}, ValueError, "refresh must be 'xfetch' or a fraction"),
    ({"refresh_after": 0}, ValueError, "refresh_after must be above 0"),
    ({"beta": 0}, ValueError, "beta must be a positive number"),
    ({"beta": "1"}, ValueError, "beta must be a positive number, not '1'"),
    ({"negative_ttl": 0}, ValueError, "negative_ttl must be above 0"),
    ({"ttl_jitter": 1}, ValueError, "ttl_jitter must be a fraction of the ttl"),
    ({"ttl_jitter": "a"}, ValueError, "ttl_jitter must be a fraction of the ttl, at least 0 and below 1, not 'a'"),
    ({"idle_ttl": 5}, ValueError, "idle_ttl requires a ttl in seconds"),
    ({"wait": "poll"}, ValueError, "wait must be 'load', 'stale' or 'raise', not 'poll'"),
    ({"wait_limit": -1}, ValueError, "wait_limit must be from 0"),
    ({"wait_limit": None}, TypeError, "wait_limit must be seconds or a timedelta, not None"),
    ({"lease_ttl": 0}, ValueError, "lease_ttl must be above 0"),
    ({"lease_ttl": None}, TypeError, "lease_ttl must be seconds or a timedelta, not None"),
    ({"tags": "t"}, TypeError, "tags must be a list"),
    ({"tags": 5}, TypeError, "tags must be a list or another iterable of str, not 5"),
    ({"tags": [["t"]]}, TypeError, r"a tag must be a str, not \['t'\]"),
    ({"tags": ["\ud800"]}, ValueError, "a tag must be valid Unicode"),
    ({"cache_errors": 5, "error_ttl": 1}, TypeError, "expected exception classes in cache_errors, not 5"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda each: str(each)[:40])
async def test_a_wrong_option_is_named(
    cache: Cache, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await cache.get_or_load("k", lambda: 1, **options)
    with pytest.raises(error, match=message):
        cache.cached(key="k", **options)


async def test_a_loader_must_be_callable(cache: Cache) -> None:
    with pytest.raises(TypeError, match="a loader must be callable, not 5"):
        await cache.get_or_load("k", 5)  # type: ignore[arg-type]


async def test_a_load_is_told_in_events(cache: Cache, clock: ManualClock) -> None:
    with cache.events(LoadSucceeded) as events:
        await cache.get_or_load("k", Counting(clock, takes=2.0))
        (event,) = heard(events)
        assert isinstance(event, LoadSucceeded)
        assert (event.key, event.duration) == ("k", 2.0)


def test_requests_of_leases_may_be_done_twice() -> None:
    assert Get.IDEMPOTENT
    assert RenewLease.IDEMPOTENT
