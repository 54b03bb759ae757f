"""`get_or_load` over one memory store: one load, its outcome, and its recipients."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import pytest

from cachebus import Cache, CacheStampedeError, CacheTimeoutError, LoadContext
from cachebus.messages import LoadFailed, LoadLeaseLost, StaleServed

from ..clock import ManualClock
from ..facade.faces import a_cache, heard


class Source:
    """Loader that counts its calls and holds each result until the test releases it."""

    def __init__(self, *, held: bool = False) -> None:
        self.calls = 0
        self.begun = anyio.Event()
        self.go_on = anyio.Event()
        self.error: Exception | None = None
        if not held:
            self.go_on.set()

    async def __call__(self) -> int:
        self.calls += 1
        self.begun.set()
        call = self.calls
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        return call


async def test_a_missing_value_is_loaded_once_and_then_read(cache: Cache, clock: ManualClock) -> None:
    source = Source()
    assert [await cache.get_or_load("k", source, ttl=60) for _ in range(3)] == [1, 1, 1]
    assert await cache.ttl("k") == 60.0
    clock.advance(60)
    assert await cache.get_or_load("k", source, ttl=60) == 2


async def test_100_tasks_share_one_load(cache: Cache) -> None:
    source = Source(held=True)
    values: list[int] = []

    async def call() -> None:
        values.append(await cache.get_or_load("k", source))

    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        source.go_on.set()
    assert values == [1] * 100


@pytest.mark.parametrize("kind", ["coroutine function", "plain function", "lambda of a coroutine"])
@pytest.mark.parametrize("takes_context", [True, False])
async def test_every_kind_of_loader_will_do(cache: Cache, kind: str, takes_context: bool) -> None:
    here = threading.get_ident()
    seen: list[Any] = []

    async def load(context: Any = None) -> str:
        seen.append((context, threading.get_ident() == here))
        return "value"

    def plain(context: Any = None) -> str:
        seen.append((context, threading.get_ident() == here))
        return "value"

    async def load_told(context: LoadContext) -> str:
        return await load(context)

    def plain_told(context: LoadContext) -> str:
        return plain(context)

    with_context: dict[str, Any] = {
        "coroutine function": load_told,
        "plain function": plain_told,
        "lambda of a coroutine": lambda context: load_told(context),  # noqa: PLW0108
    }
    without: dict[str, Any] = {
        "coroutine function": load,
        "plain function": plain,
        "lambda of a coroutine": lambda: load(),  # noqa: PLW0108
    }
    loader = (with_context if takes_context else without)[kind]
    assert await cache.get_or_load("k", loader, tags=["t"]) == "value"
    ((context, in_the_loop),) = seen
    assert in_the_loop == (kind != "plain function"), "what may block runs in a worker thread"
    assert context == (LoadContext("k", ("t",)) if takes_context else None)


async def test_a_delete_during_the_load_keeps_its_value_from_being_stored(cache: Cache) -> None:
    source = Source(held=True)
    values: list[int] = []

    async def call() -> None:
        values.append(await cache.get_or_load("k", source))

    with cache.events(LoadLeaseLost) as lost:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            await cache.delete("k")
            tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            source.go_on.set()
        assert sorted(values) == [1, 1, 2]
        assert await cache.get("k") == 2, "what was loaded before the delete was not stored"
        assert [getattr(event, "key", "") for event in heard(lost)] == ["k"]


async def test_the_error_of_a_loader_goes_to_everybody_and_the_next_may_try_at_once(cache: Cache) -> None:
    source = Source(held=True)
    source.error = LookupError("no such row")
    errors: list[str] = []

    async def call() -> None:
        try:
            await cache.get_or_load("k", source)
        except LookupError as error:
            errors.append(str(error))

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        source.go_on.set()
    assert errors == ["no such row"] * 10
    assert source.calls == 1
    source.error = None
    assert await cache.get_or_load("k", source) == 2


async def test_with_a_stale_value_an_error_is_nobodys(cache: Cache, clock: ManualClock) -> None:
    source = Source()
    assert await cache.get_or_load("k", source, ttl=10, stale_for=100) == 1
    clock.advance(10)
    source.error = LookupError()
    with cache.events(StaleServed, LoadFailed) as events:
        assert await cache.get_or_load("k", source, ttl=10, stale_for=100) == 1
        assert [type(event) for event in heard(events)] == [LoadFailed, StaleServed]
    assert await cache.get("k") is None, "a stale value is not a hit"
    clock.advance(100)
    with pytest.raises(LookupError):
        await cache.get_or_load("k", source, ttl=10, stale_for=100)


async def test_a_deleted_value_is_not_served_stale(cache: Cache, clock: ManualClock) -> None:
    source = Source()
    for remove in (
        lambda: cache.delete("k"),
        lambda: cache.delete_many(["k"]),
        lambda: cache.delete_pattern("*"),
        cache.clear,
        lambda: cache.invalidate_tags("t"),
    ):
        source.error = None
        await cache.get_or_load("k", source, ttl=10, stale_for=100, tags=["t"])
        clock.advance(10)
        await remove()
        source.error = LookupError()
        with pytest.raises(LookupError):
            await cache.get_or_load("k", source, ttl=10, stale_for=100, tags=["t"])


async def test_a_soft_timeout_serves_the_stale_value_and_the_load_is_stored(cache: Cache, clock: ManualClock) -> None:
    source = Source()
    await cache.get_or_load("k", source, ttl=10, stale_for=100)
    clock.advance(10)
    source.go_on = anyio.Event()
    for soft in (0, 0.01):
        assert await cache.get_or_load("k", source, ttl=10, stale_for=100, soft_timeout=soft) == 1
    source.go_on.set()
    with anyio.fail_after(30):
        while await cache.get("k") is None:
            await anyio.lowlevel.checkpoint()
    assert await cache.get("k") == 2
    assert source.calls == 2


async def test_a_hard_timeout_is_an_error_and_the_load_is_stored(cache: Cache) -> None:
    source = Source(held=True)
    with pytest.raises(CacheTimeoutError, match=r"the loader has not returned within 0\.01 s"):
        await cache.get_or_load("k", source, hard_timeout=0.01)
    source.go_on.set()
    with anyio.fail_after(30):
        while await cache.get("k") is None:
            await anyio.lowlevel.checkpoint()
    assert source.calls == 1


async def test_who_waits_too_long_for_another_does_as_it_has_said(cache: Cache) -> None:
    source = Source(held=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cache.get_or_load, "k", source)
        await source.begun.wait()
        with pytest.raises(CacheStampedeError):
            await cache.get_or_load("k", source, wait="raise", wait_limit=0.01)
        assert await cache.get_or_load("k", lambda: "mine", wait="load", wait_limit=0.01) == "mine"
        assert await cache.get("k") is None, "it is not stored"
        source.go_on.set()
    assert await cache.get("k") == 1


async def test_who_waits_too_long_takes_a_stale_value_if_it_has_said_so(cache: Cache, clock: ManualClock) -> None:
    await cache.get_or_load("k", lambda: "old", ttl=1, stale_for=60)
    clock.advance(1)
    source = Source(held=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cache.get_or_load, "k", source)
        await source.begun.wait()
        with cache.events(StaleServed) as events:
            assert await cache.get_or_load("k", source, wait="stale", wait_limit=0.01) == "old"
            assert len(heard(events)) == 1
        assert await cache.get_or_load("other", lambda: "mine", wait="stale", wait_limit=0.01) == "mine"
        source.go_on.set()
    assert source.calls == 1


async def test_a_value_that_is_too_big_to_store_goes_to_everybody_and_the_next_may_load(clock: ManualClock) -> None:
    async with a_cache(clock=clock, max_bytes=10_000) as cache:
        source = Source(held=True)
        values: list[Any] = []

        async def load() -> bytes:
            await source()
            return bytes(20_000)

        async def call() -> None:
            values.append(await cache.get_or_load("k", load))

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(call)
            await source.begun.wait()
            source.go_on.set()
        assert values == [bytes(20_000)] * 5
        assert source.calls == 1
        assert await cache.get("k") is None
        assert await cache.get_or_load("k", lambda: "small") == "small"


async def test_misses_that_never_wait_let_other_tasks_run(cache: Cache) -> None:
    others = 0
    done = anyio.Event()

    async def other() -> None:
        nonlocal others
        while not done.is_set():
            others += 1
            await anyio.lowlevel.checkpoint()

    async def load() -> int:
        return 1

    @cache.cached(key="d{number}")
    async def decorated(number: int) -> int:
        return number

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        await anyio.lowlevel.checkpoint()
        for way in ("get_or_load", "decorated"):
            before = others
            for number in range(200):
                await (cache.get_or_load(f"k{number}", load) if way == "get_or_load" else decorated(number))
            assert others >= before + 3, way
        done.set()
