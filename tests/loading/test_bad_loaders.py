"""Misbehaving loaders: each raises a clear error, and other callers are not affected."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from cachebus import Cache, LoadResult, SyncCache

from ..clock import ManualClock
from ..facade.faces import a_sync_cache
from .quiet import quiet
from .slow import Slow


class Stop(BaseException):
    """Error that is not an `Exception`, like that of `pytest.fail`."""


class Stopping:
    """Loaders that raise `Stop` and count their calls."""

    def __init__(self) -> None:
        self.calls = 0

    async def wait(self) -> None:
        self.calls += 1
        await anyio.lowlevel.checkpoint()
        raise Stop

    async def at_once(self) -> None:
        self.calls += 1
        raise Stop

    def plain(self) -> None:
        self.calls += 1
        raise Stop


@pytest.mark.parametrize("kind", ["wait", "at_once", "plain"])
async def test_what_is_no_exception_is_raised_to_whoever_began_the_load(cache: Cache, kind: str) -> None:
    loader = Stopping()
    with anyio.fail_after(5), pytest.raises(Stop):
        await cache.get_or_load("k", getattr(loader, kind))
    assert loader.calls == 1
    await quiet(cache)
    assert await cache.get_or_load("k", lambda: "value") == "value"


async def test_nor_is_a_stale_value_served_instead(cache: Cache, clock: ManualClock) -> None:
    loader = Stopping()
    await cache.get_or_load("k", lambda: "old", ttl=1, stale_for=60)
    clock.advance(1)
    with anyio.fail_after(5), pytest.raises(Stop):
        await cache.get_or_load("k", loader.wait)
    assert loader.calls == 1


async def test_those_who_wait_for_it_load_themselves(cache: Cache) -> None:
    stopped = Slow(Stop())
    outcomes: list[Any] = []

    async def first() -> None:
        try:
            await cache.get_or_load("k", stopped)
        except Stop as error:
            outcomes.append(type(error))

    async def second() -> None:
        outcomes.append(await cache.get_or_load("k", lambda: "value"))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            await stopped.begun.wait()
            tasks.start_soon(second)
            await anyio.wait_all_tasks_blocked()
            stopped.go_on.set()
    assert sorted(outcomes, key=str) == [Stop, "value"]


async def test_a_loader_of_many_is_no_different(cache: Cache) -> None:
    calls: list[list[str]] = []

    async def load(keys: list[str]) -> None:
        calls.append(keys)
        await anyio.lowlevel.checkpoint()
        raise Stop

    with anyio.fail_after(5), pytest.raises(Stop):
        await cache.get_or_load_many(["a", "b"], load)
    assert calls == [["a", "b"]]
    await quiet(cache)


@pytest.mark.parametrize("options", [{}, {"soft_timeout": 1}, {"hard_timeout": 5}], ids=str)
def test_nor_is_a_thread(options: dict[str, Any]) -> None:
    loader = Stopping()
    with a_sync_cache() as cache:
        with pytest.raises(Stop):
            cache.get_or_load("k", loader.plain, **options)
        assert loader.calls == 1
        assert cache.get_or_load("k", lambda: "value") == "value"


def numbers() -> Any:
    yield 1


async def numbers_awaited() -> Any:
    yield 1


@pytest.mark.parametrize(
    "loader", [numbers, numbers_awaited, lambda: (each for each in "abc")], ids=lambda each: each.__name__
)
async def test_a_generator_is_no_value(cache: Cache, loader: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="a loader must not return a generator"):
        await cache.get_or_load("k", loader)
    assert await cache.get("k") is None


@pytest.mark.parametrize("brought", [None, ["k"], "k", 5, LoadResult({"k": 1})], ids=lambda each: type(each).__name__)
async def test_a_loader_of_many_brings_a_mapping(cache: Cache, brought: Any) -> None:
    with pytest.raises(TypeError, match="a loader of many keys must return a mapping of keys to values, not "):
        await cache.get_or_load_many(["k"], lambda keys: brought)
    await quiet(cache)
    with pytest.raises(TypeError, match="a loader must be callable, not 5"):
        await cache.get_or_load_many(["k"], 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"ttl": 0}, ValueError, "ttl must be a positive, finite time, not 0"),
        ({"ttl": "1"}, TypeError, "ttl must be seconds"),
        ({"stale_for": -1}, ValueError, "stale_for must be from 0 to 1e[+]09 seconds, not -1"),
        ({"stale_for": "1"}, TypeError, "stale_for must be seconds or a timedelta, not '1'"),
        ({"tags": "t"}, TypeError, "tags must be a list or another iterable of str, not 't'"),
        ({"etag": 5}, TypeError, "etag must be a str, not 5"),
        ({"etag": "\ud800"}, ValueError, "etag must be valid Unicode"),
        ({"etag": "é" * 513}, ValueError, "etag must have at most 1024 bytes, not 1026"),
        ({"store": "no"}, TypeError, "store must be True or False, not 'no'"),
    ],
    ids=lambda each: ascii(each)[:40],
)
def test_a_result_that_makes_no_sense_is_an_error_where_it_is_made(
    given: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        LoadResult("value", **given)


def test_a_synchronous_loader_may_be_broken_off_while_a_thread_waits() -> None:
    with a_sync_cache() as cache:
        begun, go_on = threading.Event(), threading.Event()
        outcomes: list[Any] = []

        def stopped() -> None:
            begun.set()
            go_on.wait(5)
            raise Stop

        def first(cache: SyncCache = cache) -> None:
            with pytest.raises(Stop):
                cache.get_or_load("k", stopped, hard_timeout=5)

        def second(cache: SyncCache = cache) -> None:
            outcomes.append(cache.get_or_load("k", lambda: "value"))

        threads = [threading.Thread(target=each) for each in (first, second)]
        threads[0].start()
        begun.wait(5)
        threads[1].start()
        go_on.set()
        for thread in threads:
            thread.join(5)
    assert outcomes == ["value"]
