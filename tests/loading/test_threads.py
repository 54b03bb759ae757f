"""Loads that start in threads."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from anyio.lowlevel import checkpoint

from cachebus import CacheError, CacheTimeoutError, SyncCache
from cachebus.loading.runners import MAX_THREADS, _threads
from cachebus.loading.singleflight import _graph

from ..clock import ManualClock
from ..facade.faces import a_sync_cache


@pytest.mark.parametrize("inline", [True, False], ids=["inline turns", "turns by the task"])
def test_threads_share_one_load(inline: bool) -> None:
    calls: list[int] = []
    barrier = threading.Barrier(32)

    def load(number: int) -> int:
        calls.append(number)
        return number

    with a_sync_cache(inline=inline) as cache:

        def call(_: int) -> list[Any]:
            out = []
            for number in range(30):
                barrier.wait()
                out.append(cache.get_or_load(f"k{number}", functools.partial(load, number)))
            return out

        with ThreadPoolExecutor(32) as pool:
            results = list(pool.map(call, range(32)))
    assert results == [list(range(30))] * 32
    assert sorted(calls) == list(range(30))


@pytest.fixture
def sync_cache(clock: ManualClock) -> Any:
    with a_sync_cache(clock=clock) as cache:
        yield cache


def test_a_plain_loader_runs_in_the_calling_thread(sync_cache: SyncCache) -> None:
    assert sync_cache.get_or_load("k", threading.get_ident) == threading.get_ident()


def test_a_coroutine_function_runs_in_the_loop_of_the_cache(sync_cache: SyncCache) -> None:
    async def load() -> int:
        await checkpoint()
        return threading.get_ident()

    assert sync_cache.get_or_load("k", load) != threading.get_ident()

    async def load_itself() -> Any:
        return await asyncio.to_thread(sync_cache.get_or_load, "own", load_itself)

    with pytest.raises(CacheError, match="requested the key that it is loading"):
        sync_cache.get_or_load("own", load_itself)


def test_a_thread_that_stops_waiting_lets_the_load_go_on(sync_cache: SyncCache) -> None:
    go_on = threading.Event()

    def load() -> str:
        go_on.wait(30)
        return "value"

    with pytest.raises(CacheTimeoutError):
        sync_cache.get_or_load("k", load, hard_timeout=0.01)
    with sync_cache.events("cache_set") as events:
        go_on.set()
        assert events.next(5) is not None
    assert sync_cache.get("k") == "value"


@pytest.mark.parametrize(
    ("later", "options"),
    [(1, {"ttl": 1, "stale_for": 60, "soft_timeout": 0}), (6, {"ttl": 10, "refresh": 0.5})],
    ids=["served stale", "refreshed while it lives"],
)
def test_a_value_is_loaded_anew_beside_the_thread_that_reads_it(
    sync_cache: SyncCache, clock: ManualClock, later: float, options: dict[str, Any]
) -> None:
    sync_cache.get_or_load("k", lambda: "old", **options)
    clock.advance(later)
    with sync_cache.events("cache_set") as events:
        assert sync_cache.get_or_load("k", lambda: "new", **options) == "old"
        assert events.next(5) is not None
    assert sync_cache.get("k") == "new"


def test_a_blocking_call_on_the_loop_of_the_cache_is_refused_and_stops_nobody(sync_cache: SyncCache) -> None:
    async def inner() -> str:
        return "inner"

    async def outer() -> Any:
        return sync_cache.get_or_load("inner", inner)

    with pytest.raises(CacheError, match="a blocking call would block the event loop that it waits for"):
        sync_cache.get_or_load("outer", outer)

    async def opening() -> Any:
        with a_sync_cache() as another:
            return another.get("k")

    with pytest.raises(CacheError, match="a blocking call would block the event loop that it waits for"):
        sync_cache.get_or_load("outer", opening)
    assert sync_cache.get_or_load("inner", inner) == "inner"


def test_a_load_that_can_have_no_thread_of_its_own_is_done_by_whoever_asks(
    sync_cache: SyncCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync_cache.get("k")

    def no_more(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    assert sync_cache.get_or_load("k", threading.get_ident, hard_timeout=5) == threading.get_ident()
    assert sync_cache.loads.table.in_flight == {}
    assert len(sync_cache.loads.table.renewals) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_the_child_of_a_fork_has_all_its_threads_and_a_graph_that_nobody_holds(sync_cache: SyncCache) -> None:
    with _graph.value:
        for _ in range(MAX_THREADS):
            assert _threads.value.acquire(blocking=False)
        pid = os.fork()
        if not pid:
            free = _threads.value.acquire(blocking=False)
            os._exit(0 if free and _graph.value.acquire(blocking=False) else 1)
        for _ in range(MAX_THREADS):
            _threads.value.release()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
