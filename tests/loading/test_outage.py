"""Loading while the backend fails: `on_error="miss"` uses the loader alone, and `"raise"` raises the error."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio import to_thread

from cachebus import CacheConnectionError
from cachebus.client.background_loop import run
from cachebus.messages import Get, GetOrLease, LoadLeaseLost, ReleaseLease, RequestFailed, Set

from ..facade.faces import heard
from ..facade.outages import Outage, down
from ..facade.test_on_error import a_cache
from .slow import Slow


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Source:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls

    def many(self, keys: list[str]) -> dict[str, int]:
        return {key: self() for key in keys}


def on_both_faces(test: Any) -> Any:
    """Run a test over `Cache`, and again in a thread over `SyncCache`, where it never suspends."""

    @pytest.mark.parametrize("face", ["async", "sync"])
    @functools.wraps(test)
    async def either(face: str, **arguments: Any) -> None:
        if face == "async":
            await test(face, **arguments)
        else:
            await to_thread.run_sync(lambda: run(test(face, **arguments)))

    return either


async def until(face: str, reached: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < limit
        if face == "async":
            await anyio.sleep(0.001)
        else:
            time.sleep(0.001)


def asked(store: Outage, kind: type) -> list[Any]:
    return [each for batch in store.asked for each in batch if type(each) is kind]


@on_both_faces
async def test_the_loader_runs_and_nothing_is_stored(face: str) -> None:
    store, source = Outage(), Source()
    async with a_cache(face, store, on_error="miss") as cache:
        assert await cache.get_or_load("k", source, ttl=0.001, stale_for=60) == 1
        store.error = down()
        before = (await cache.statistics()).errors
        asked_before = len(store.asked)
        with cache.events(RequestFailed) as events:
            assert [await cache.get_or_load("k", source) for _ in range(2)] == [2, 3]
            emitted: list[Any] = list(heard(events))
            assert [(each.request, each.outcome) for each in emitted] == [("backend.get", "missed")] * 2
        assert (await cache.statistics()).errors == before + 2
        assert len(store.asked) == asked_before + 2, "who could not read does not ask for a lease"
        assert await cache.get_or_load_many(["k", "l"], source.many) == {"k": 4, "l": 5}
        store.error = None
        assert await cache.get("k") is None
        assert await cache.get("l") is None
        assert await cache.get_or_load("k", source) == 6
        assert await cache.get("k") == 6


@on_both_faces
async def test_a_decorated_function_is_called(face: str) -> None:
    store, calls = Outage(), 0

    def load() -> int:
        nonlocal calls
        calls += 1
        return calls

    async def load_async() -> int:
        return load()

    async with a_cache(face, store, on_error="miss") as cache:
        store.error = down()
        if face == "async":
            call = cache.cached(key="k")(load_async)
            assert [await call() for _ in range(3)] == [1, 2, 3]
        else:
            plain = cache.cached(key="k")(load)
            assert [plain() for _ in range(3)] == [1, 2, 3]


@on_both_faces
async def test_the_error_goes_out_where_it_is_asked_for(face: str) -> None:
    store, source = Outage(), Source()
    async with a_cache(face, store, on_error="raise") as cache:
        store.error = down()
        with pytest.raises(CacheConnectionError):
            await cache.get_or_load("k", source)
        with pytest.raises(CacheConnectionError):
            await cache.get_or_load_many(["k"], source.many)
        store.error = None
        store.fails = lambda request: down() if isinstance(request, GetOrLease) else None
        with pytest.raises(CacheConnectionError):
            await cache.get_or_load("k", source)
        with pytest.raises(CacheConnectionError):
            await cache.get_or_load_many(["k"], source.many)
        assert source.calls == 0


@on_both_faces
async def test_a_lease_of_which_nobody_heard_is_given_back(face: str) -> None:
    store, source = Outage(), Source()
    async with a_cache(face, store, on_error="miss") as cache:
        store.fails = lambda request: down() if isinstance(request, GetOrLease) else None
        assert await cache.get_or_load("k", source) == 1
        assert await cache.get_or_load_many(["l"], source.many) == {"l": 2}
        await until(face, lambda: {each.key for each in asked(store, ReleaseLease)} == {"k", "l"})
        assert asked(store, Set) == []
        assert (await cache.statistics()).errors == 2
        store.fails = lambda request: None
        assert await cache.get_or_load("k", source) == 3
        assert await cache.get("k") == 3


@on_both_faces
@pytest.mark.parametrize("on_error", ["miss", "raise"])
async def test_a_value_that_could_not_be_stored_is_returned_and_its_lease_given_back(face: str, on_error: str) -> None:
    store, source = Outage(), Source()
    async with a_cache(face, store, on_error=on_error) as cache:
        store.fails = lambda request: down() if isinstance(request, Set) else None
        with cache.events(LoadLeaseLost) as events:
            assert await cache.get_or_load("k", source, tags=[]) == 1
            await until(face, lambda: bool(asked(store, ReleaseLease)))
            assert heard(events) == [], "the lease was not lost"
        assert (await cache.statistics()).dropped_writes == (1 if on_error == "miss" else 0)


async def test_those_who_wait_for_the_load_of_a_cache_that_lost_its_backend_are_served() -> None:
    store, source = Outage(), Source()
    async with a_cache("async", store, on_error="miss") as cache:
        slow = Slow(7)
        values: list[int] = []

        async def ask() -> None:
            values.append(await cache.get_or_load("k", slow))

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(ask)
            await slow.begun.wait()
            store.fails = lambda request: None if isinstance(request, Get) else down()
            slow.go_on.set()
        assert values == [7] * 5
        assert source.calls == 0
