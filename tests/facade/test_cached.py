"""The decorator: one load per key, for coroutine functions and plain ones, over both facades."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from cachebus import (
    Cache,
    CacheClosed,
    CacheConfigurationError,
    CacheError,
    CacheKeyError,
    Found,
    SyncCache,
    open_sync_cache,
)
from cachebus.adapters.memory import MemoryStore
from cachebus.messages import CacheSet, LoadFailed, LoadStarted, LoadSucceeded, Set
from tests.clock import ManualClock

from .faces import a_cache, a_sync_cache, heard, settings


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def sync_cache(clock: ManualClock) -> Iterator[SyncCache]:
    with a_sync_cache(clock=clock) as cache:
        yield cache


class Loader:
    """Counts its calls, and holds each until it is let go."""

    def __init__(self) -> None:
        self.calls = 0
        self.begun = anyio.Event()
        self.go_on = anyio.Event()

    async def __call__(self, key: str) -> str:
        self.calls += 1
        self.begun.set()
        await self.go_on.wait()
        return f"{key} {self.calls}"


# One load


@pytest.mark.parametrize("inline", [True, False], ids=["inline turns", "turns by the task"])
async def test_100_tasks_that_miss_at_once_share_one_load(inline: bool) -> None:
    loader = Loader()
    async with a_cache(inline=inline) as cache:

        @cache.cached(key="k:{key}")
        async def load(key: str) -> str:
            return await loader(key)

        values: list[str] = []

        async def call() -> None:
            values.append(await load("a"))

        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            loader.go_on.set()
        assert values == ["a 1"] * 100
        assert loader.calls == 1
        assert await load("a") == "a 1"
        assert await cache.get("k:a") == "a 1"
        assert await load("b") == "b 2"


@pytest.mark.parametrize("inline", [True, False], ids=["inline turns", "turns by the task"])
def test_32_threads_that_miss_at_once_share_one_load(inline: bool) -> None:
    calls: list[str] = []
    waiting = threading.Barrier(32)
    with a_sync_cache(inline=inline) as cache:

        @cache.cached(key="k:{key}")
        def load(key: str) -> str:
            calls.append(key)
            return key * 2

        def call(_: int) -> list[str]:
            out = []
            for round_ in range(50):
                waiting.wait()
                out.append(load(f"{round_}"))
            return out

        with ThreadPoolExecutor(32) as pool:
            results = list(pool.map(call, range(32)))
    assert results == [[f"{round_}" * 2 for round_ in range(50)]] * 32
    assert sorted(calls, key=int) == [f"{round_}" for round_ in range(50)]


@pytest.mark.parametrize("leader", ["a task", "a thread"])
def test_tasks_and_threads_share_one_load(leader: str) -> None:
    calls: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    async def main() -> None:
        async with a_cache() as cache:

            @cache.cached(key="{key}")
            async def load(key: str) -> str:
                calls.append("a task")
                begun.set()
                await asyncio.to_thread(go_on.wait)
                return f"{key} from {calls[0]}"

            @cache.cached(key="{key}")
            def load_plain(key: str) -> str:
                calls.append("a thread")
                begun.set()
                go_on.wait()
                return f"{key} from {calls[0]}"

            def in_another_loop() -> str:
                return anyio.run(load, "x", backend="trio")

            with ThreadPoolExecutor(20) as pool:
                loop = asyncio.get_running_loop()
                if leader == "a task":
                    first: asyncio.Future[str] = asyncio.ensure_future(load("x"))
                else:
                    first = loop.run_in_executor(pool, load_plain, "x")
                await loop.run_in_executor(pool, begun.wait)
                others: list[asyncio.Future[str]] = [asyncio.ensure_future(load("x")) for _ in range(20)]
                others += [loop.run_in_executor(pool, load_plain, "x") for _ in range(8)]
                others += [loop.run_in_executor(pool, in_another_loop) for _ in range(4)]
                # Whether each waits already or comes after the load: there is one load.
                await asyncio.sleep(0)
                go_on.set()
                values = await asyncio.gather(first, *others)
            assert set(values) == {f"x from {leader}"}

    asyncio.run(main())
    assert calls == [leader]


async def test_keys_do_not_wait_for_each_other() -> None:
    slow = Loader()
    async with a_cache() as cache:

        @cache.cached(key="slow:{key}")
        async def load_slow(key: str) -> str:
            return await slow(key)

        @cache.cached(key="fast:{key}")
        async def load_fast(key: str) -> str:
            return key

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load_slow, "a")
            await slow.begun.wait()
            assert await load_fast("b") == "b"
            await cache.set("c", 1)
            assert await cache.get("c") == 1
            assert await cache.get("slow:a") is None
            assert (await cache.health()).ok, "the load is not a turn of the backend's"
            slow.go_on.set()


def test_a_plain_load_is_not_a_turn_of_the_backends(sync_cache: SyncCache) -> None:
    @sync_cache.cached(key="outer")
    def load() -> Any:
        sync_cache.set("inner", 1)
        return [sync_cache.get("inner"), sync_cache.health().ok, inner()]

    @sync_cache.cached(key="another")
    def inner() -> int:
        return 2

    assert load() == [1, True, 2]


async def test_a_load_that_comes_in_after_the_miss_is_not_done_again() -> None:
    # The value arrives after a caller has missed and before it leads: it looks again.
    async with a_cache() as cache:
        calls = 0

        @cache.cached(key="key")
        async def load() -> int:
            nonlocal calls
            calls += 1
            return calls

        link = cache.link
        turn_get = link.turn_get

        def miss_then_store(request: Any) -> Any:
            reply = turn_get(request)
            link.turn_get = turn_get
            link.turn_set(Set("key", "meanwhile"))
            return reply

        link.turn_get = miss_then_store
        assert await load() == "meanwhile"  # type: ignore[comparison-overlap]
        assert calls == 0
        statistics = await cache.statistics()
        assert (statistics.hits, statistics.misses) == (0, 1), "asking for the lease is neither"


# What goes in and what comes out


@pytest.mark.parametrize("value", [None, 0, "", [], False])
async def test_whatever_is_returned_is_cached(value: Any) -> None:
    calls = 0
    async with a_cache() as cache:

        @cache.cached(key="key")
        async def load() -> Any:
            nonlocal calls
            calls += 1
            return value

        assert await load() is value
        assert await load() is value
        assert calls == 1


async def test_an_asynchronous_cache_decorates_a_plain_function() -> None:
    calls = 0
    async with a_cache() as cache:

        @cache.cached(key="{number}")
        def double(number: int) -> int:
            nonlocal calls
            calls += 1
            return number * 2

        assert (double(4), double(4), await cache.get("4")) == (8, 8, 8)
        assert calls == 1


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("inline", [True, False], ids=["inline turns", "turns by the task"])
def test_a_synchronous_cache_decorates_a_coroutine_function(backend: str, inline: bool) -> None:
    calls = 0
    with a_sync_cache(inline=inline) as cache:
        cache.get("opened")

        @cache.cached(key="{number}")
        async def double(number: int) -> int:
            nonlocal calls
            calls += 1
            await checkpoint()
            return number * 2

        async def main() -> list[int]:
            return [await double(4), await double(4)]

        assert anyio.run(main, backend=backend) == [8, 8]
        assert cache.get("4") == 8
        assert calls == 1


def test_a_tag_template_that_gives_an_empty_tag_is_an_error(sync_cache: SyncCache) -> None:
    load = sync_cache.cached(key="k", tags=["{tag}"])(lambda tag: tag)
    with pytest.raises(ValueError, match="a tag must not be empty"):
        load("")
    assert sync_cache.exists("k") is False


async def test_the_time_to_live_and_the_tags_go_with_the_value(clock: ManualClock) -> None:
    calls = 0
    async with a_cache(clock=clock) as cache:

        @cache.cached(key="user:{user}", ttl=60, tags=["users", "team:{team}", "team:{user}"])
        async def load(user: int, team: int) -> int:
            nonlocal calls
            calls += 1
            return calls

        assert await load(1, team=1) == 1
        found = await cache.lookup("user:1")
        assert isinstance(found, Found)
        assert (found.ttl, found.tags) == (60.0, ("users", "team:1"))
        await cache.invalidate_tags("team:2")
        assert await load(1, team=1) == 1
        await cache.invalidate_tags("team:1")
        assert await load(1, team=1) == 2
        clock.advance(60)
        assert await load(1, team=1) == 3


def test_the_default_time_to_live_is_the_backends(clock: ManualClock) -> None:
    with a_sync_cache(clock=clock, default_ttl=7.0) as cache:
        cache.cached(key="key")(lambda: 1)()
        assert cache.ttl("key") == 7.0
        cache.cached(key="none", ttl=None)(lambda: 1)()
        assert cache.ttl("none") is None


async def test_a_load_is_told_in_events() -> None:
    async with a_cache() as cache:
        with cache.events(LoadStarted, LoadSucceeded, LoadFailed, CacheSet) as events:

            @cache.cached(key="{key}")
            async def load(key: str) -> str:
                if key == "bad":
                    raise LookupError(key)
                return key

            await load("good")
            await load("good")
            with pytest.raises(LookupError):
                await load("bad")
            said: list[Any] = [*heard(events)]
        assert [(type(event), event.key) for event in said] == [
            (LoadStarted, "good"),
            (LoadSucceeded, "good"),
            (CacheSet, "good"),
            (LoadStarted, "bad"),
            (LoadFailed, "bad"),
        ]
        assert said[-1].error == "LookupError"
        assert {event.backend for event in said} == {"primary"}


def test_a_load_is_timed_by_the_clock_of_the_node(sync_cache: SyncCache, clock: ManualClock) -> None:
    @sync_cache.cached(key="{key}")
    def load(key: str) -> str:
        clock.advance(2.5)
        if key == "bad":
            raise LookupError(key)
        return key

    with sync_cache.events(LoadSucceeded, LoadFailed) as events:
        load("good")
        with pytest.raises(LookupError):
            load("bad")
        said: list[Any] = [*heard(events)]
        assert [event.duration for event in said] == [2.5, 2.5]


# What goes wrong


async def test_an_error_goes_to_everybody_who_waits_and_nothing_is_stored() -> None:
    loader = Loader()
    errors: list[Exception] = []
    async with a_cache() as cache:

        @cache.cached(key="key")
        async def load() -> str:
            await loader("key")
            if loader.calls == 1:
                raise LookupError("no such row")
            return "found"

        async def call() -> None:
            try:
                await load()
            except LookupError as error:
                errors.append(error)

        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(call)
            await anyio.wait_all_tasks_blocked()
            loader.go_on.set()
        assert [str(error) for error in errors] == ["no such row"] * 20
        assert loader.calls == 1
        assert await cache.exists("key") is False
        assert await load() == "found"


def test_an_error_goes_to_every_thread_that_waits(sync_cache: SyncCache) -> None:
    calls = 0
    begun, go_on = threading.Event(), threading.Event()

    @sync_cache.cached(key="key")
    def load() -> str:
        nonlocal calls
        calls += 1
        begun.set()
        go_on.wait()
        if calls == 1:
            raise LookupError("no such row")
        return "found"

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(load)
        begun.wait()
        (flight,) = sync_cache._loads.flights.values()
        loads = [pool.submit(load) for _ in range(7)]
        while len(flight._ports) < 8:
            pass
        go_on.set()
        errors = [each.exception() for each in (first, *loads)]
    assert [repr(error) for error in errors] == ["LookupError('no such row')"] * 8
    assert load() == "found"
    assert sync_cache._loads.flights == {}


@pytest.mark.parametrize("cancelled", ["the leader", "a waiter", "all but the last"])
async def test_cancelling_some_does_not_cancel_the_load_for_the_others(cancelled: str) -> None:
    loader = Loader()
    values: dict[int, str] = {}
    scopes = [anyio.CancelScope() for _ in range(5)]
    gone = {"the leader": [0], "a waiter": [2], "all but the last": [0, 1, 2, 3]}[cancelled]
    async with a_cache() as cache:

        @cache.cached(key="key")
        async def load() -> str:
            return await loader("key")

        async def call(number: int) -> None:
            with scopes[number]:
                values[number] = await load()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, 0)
            await loader.begun.wait()
            for number in range(1, 5):
                tasks.start_soon(call, number)
            await anyio.wait_all_tasks_blocked()
            for number in gone:
                scopes[number].cancel()
                await anyio.wait_all_tasks_blocked()
            loader.go_on.set()
        assert set(values) == set(range(5)) - set(gone)
        assert len(set(values.values())) == 1
        assert loader.calls == 1
        assert await cache.get("key") == values[4]
        assert cache._loads.flights == {}


async def test_cancelling_all_leaves_nothing_behind() -> None:
    loader = Loader()
    async with a_cache() as cache:

        @cache.cached(key="key")
        async def load() -> str:
            return await loader("key")

        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(load)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        await anyio.wait_all_tasks_blocked()
        assert cache._loads.flights == {}
        assert await cache.exists("key") is False
        loader.go_on.set()
        assert await load() == f"key {loader.calls}"


def test_when_the_loading_thread_is_interrupted_another_one_loads(sync_cache: SyncCache) -> None:
    calls = 0
    begun, go_on = threading.Event(), threading.Event()

    @sync_cache.cached(key="key")
    def load() -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            begun.set()
            go_on.wait()
            raise KeyboardInterrupt
        return calls

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(load)
        begun.wait()
        (flight,) = sync_cache._loads.flights.values()
        second = pool.submit(load)
        while len(flight._ports) < 2:
            pass
        go_on.set()
        assert second.result() == 2
        assert isinstance(first.exception(), KeyboardInterrupt)
    assert sync_cache.get("key") == 2


async def test_a_loader_that_asks_for_its_own_key_is_told_so() -> None:
    async with a_cache() as cache:

        @cache.cached(key="n:{n}")
        async def load(n: int) -> int:
            return 1 + await other(n)

        @cache.cached(key="m:{n}")
        async def other(n: int) -> int:
            return 1 + await load(n)

        with pytest.raises(CacheError, match="a loader asks for the very key that it is loading"):
            await load(1)

        @cache.cached(key="f:{n}")
        async def factorial(n: int) -> int:
            return n * await factorial(n - 1) if n else 1

        assert await factorial(20) == 2_432_902_008_176_640_000
        assert cache._loads.flights == {}


def test_a_plain_loader_that_asks_for_its_own_key_is_told_so(sync_cache: SyncCache) -> None:
    @sync_cache.cached(key="n:{n}")
    def load(n: int) -> int:
        return 1 + load(n)

    with pytest.raises(CacheError, match="a loader asks for the very key that it is loading"):
        load(1)

    @sync_cache.cached(key="f:{n}")
    def factorial(n: int) -> int:
        return n * factorial(n - 1) if n else 1

    assert factorial(20) == 2_432_902_008_176_640_000


async def test_a_plain_call_on_the_loop_that_loads_the_key_is_refused_and_not_a_deadlock() -> None:
    loader = Loader()
    async with a_cache() as cache:

        @cache.cached(key="key")
        async def load() -> str:
            return await loader("key")

        plain = cache.cached(key="key")(lambda: "plain")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load)
            await loader.begun.wait()
            with pytest.raises(CacheError, match="is being loaded by a task of this very thread"):
                plain()
            loader.go_on.set()
        assert plain() == "key 1"


@pytest.mark.parametrize("shape", ["coroutine", "plain"])
async def test_a_value_that_cannot_be_stored_is_returned_with_a_warning(
    shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with a_cache(max_bytes=1_000, weigher=len) as cache:
        big = "x" * 2_000
        calls = 0

        def count() -> str:
            nonlocal calls
            calls += 1
            return big

        @cache.cached(key="key")
        async def load() -> str:
            return count()

        plain = cache.cached(key="key")(count)
        with caplog.at_level(logging.WARNING, "cachebus"):
            for _ in range(2):
                assert (await load() if shape == "coroutine" else plain()) is big
        told = [record.getMessage() for record in caplog.records if record.name == "cachebus"]
        assert told == ["a loaded value was not stored: capacity"] * 2
        assert calls == 2
        assert await cache.exists("key") is False


async def test_a_closed_cache_does_not_load() -> None:
    calls = 0
    cache = a_cache()

    @cache.cached(key="key")
    async def load() -> None:
        nonlocal calls
        calls += 1

    with pytest.raises(CacheClosed, match="not open"):
        await load()
    async with cache:
        await load()
    with pytest.raises(CacheClosed, match="closed"):
        await load()
    assert calls == 1


def test_a_synchronous_cache_is_opened_by_the_first_call() -> None:
    cache = a_sync_cache()
    assert cache.cached(key="key")(lambda: 1)() == 1
    assert cache.get("key") == 1
    cache.close()
    with pytest.raises(CacheClosed, match="closed"):
        cache.cached(key="key")(lambda: 1)()


# Functions of all kinds


def test_the_decorated_function_looks_like_the_original(sync_cache: SyncCache) -> None:
    def plain(a: int, /, b: str = "b", *args: float, c: bytes, **kwargs: object) -> list[int]:
        """Documented."""
        return [a]

    async def coroutine(a: int) -> list[int]:
        """Documented, too."""
        return [a]

    originals: list[Callable[..., Any]] = [plain, coroutine]
    for original in originals:
        decorated = sync_cache.cached(key="{a}")(original)
        assert decorated.__name__ == original.__name__
        assert decorated.__qualname__ == original.__qualname__
        assert decorated.__doc__ == original.__doc__
        assert decorated.__module__ == original.__module__
        assert inspect.get_annotations(decorated) == inspect.get_annotations(original)
        assert inspect.signature(decorated) == inspect.signature(original)
        assert inspect.iscoroutinefunction(decorated) == inspect.iscoroutinefunction(original)
        assert inspect.unwrap(decorated) is original


def key_of(cache: SyncCache, function: Callable[..., Any], template: Any, *args: Any, **kwargs: Any) -> str:
    """The key under which `function(*args, **kwargs)` is kept."""
    cache.clear()
    cache.cached(key=template)(function)(*args, **kwargs)
    (key,) = cache.scan()
    return key


class User:
    def __init__(self, number: int) -> None:
        self.id = number
        self.roles = {"first": ["admin"]}


def f(a: Any = None, b: Any = "b", *args: Any, c: Any = "c", **kwargs: Any) -> int:
    return 1


def positional_only(a: Any, b: Any = 2, /) -> int:
    return 1


def positional_and_more(a: Any, b: Any = 2, /, c: Any = 3) -> int:
    return 1


def keyword_only(*, a: Any, b: Any = 2) -> int:
    return 1


def awkward(_fill: Any, format: Any = 1, self: Any = 2, template: Any = 3) -> int:  # noqa: A002 (that is the point)
    return 1


@pytest.mark.parametrize(
    ("function", "template", "args", "kwargs", "expected"),
    [
        (f, "k", (), {}, "k"),
        (f, "{a}:{b}:{c}", (1,), {}, "1:b:c"),
        (f, "{a}:{b}:{c}", (), {"a": 1}, "1:b:c"),
        (f, "{a}:{b}:{c}", (1, 2, 3), {"c": 4}, "1:2:4"),
        (f, "{a.id}", (User(7),), {}, "7"),
        (f, "{a.roles[first][0]}", (User(7),), {}, "admin"),
        (f, "{a[0]}{a[1]}", (("x", "y"),), {}, "xy"),
        (f, "{args}", (1, 2, 3, 4), {}, "(3, 4)"),
        (f, "{args[0]}", (1, 2, 3, 4), {}, "3"),
        (f, "{kwargs[x]}", (), {"x": 5}, "5"),
        (f, "{a!r:>5}|{b:{c}}", ("x", 3), {"c": "03"}, "  'x'|003"),
        (f, "{{{a}}}", (1,), {}, "{1}"),
        (positional_only, "{a}:{b}", (1,), {}, "1:2"),
        (positional_and_more, "{a}:{b}:{c}", (1,), {"c": 5}, "1:2:5"),
        (keyword_only, "{a}:{b}", (), {"a": 1}, "1:2"),
        (awkward, "{_fill}:{format}:{self}:{template}", ("x",), {}, "x:1:2:3"),
        (f, lambda a, **more: f"{a}:{sorted(more)}", (1,), {"x": 2}, "1:['x']"),
        (functools.partial(f, 1), "{a}", (), {}, "1"),
        (lambda n=5: 1, "{n}", (), {}, "5"),
    ],
)
def test_templates_and_functions_make_keys(
    sync_cache: SyncCache, function: Any, template: Any, args: tuple[Any, ...], kwargs: Any, expected: str
) -> None:
    if isinstance(function, functools.partial):
        function = functools.update_wrapper(lambda a=1: f(a), f, assigned=(), updated=())
        del function.__wrapped__
    assert key_of(sync_cache, function, template, *args, **kwargs) == expected


def test_a_value_given_by_name_or_by_place_has_the_same_key(sync_cache: SyncCache) -> None:
    calls: list[tuple[int, int]] = []

    @sync_cache.cached(key="{a}:{b}")
    def load(a: int, b: int = 2) -> int:
        calls.append((a, b))
        return a

    for each in (load(1), load(a=1), load(1, 2), load(1, b=2), load(b=2, a=1)):
        assert each == 1
    assert calls == [(1, 2)]


def test_wrong_arguments_are_a_type_error_as_without_the_decorator(sync_cache: SyncCache) -> None:
    @sync_cache.cached(key="{a}")
    def load(a: int) -> int:
        return a

    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        load()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="unexpected keyword argument 'b'"):
        load(1, b=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def test_methods_are_decorated_like_functions() -> None:
    cache = a_cache()

    class Repository:
        def __init__(self, name: str) -> None:
            self.name = name
            self.calls = 0

        @cache.cached(key="{self.name}:{number}")
        async def load(self, number: int) -> str:
            self.calls += 1
            return f"{self.name} {number}"

        @cache.cached(key="plain:{self.name}")
        def plain(self) -> str:
            return self.name

        @classmethod
        @cache.cached(key="{cls.__name__}:{number}")
        async def make(cls, number: int) -> str:
            return f"{cls.__name__} {number}"

        @staticmethod
        @cache.cached(key="static:{number}")
        async def double(number: int) -> int:
            return number * 2

    class Below(Repository): ...

    async with cache:
        one, two = Repository("one"), Repository("two")
        assert [await one.load(1), await two.load(1), await one.load(number=1)] == ["one 1", "two 1", "one 1"]
        assert (one.calls, two.calls) == (1, 1)
        assert (one.plain(), two.plain()) == ("one", "two")
        assert [await Repository.make(1), await Below.make(1), await Repository.double(4)] == [
            "Repository 1",
            "Below 1",
            8,
        ]


async def square(number: int) -> int:
    return number * number


async def test_objects_that_can_be_called_are_decorated() -> None:
    class Load:
        calls = 0

        async def __call__(self, number: int) -> int:
            self.calls += 1
            return number

    async with a_cache() as cache:
        original = Load()
        load = cache.cached(key="{number}")(original)
        assert [await load(1), await load(1)] == [1, 1]
        assert original.calls == 1
        partial = cache.cached(key="{number}")(functools.partial(square, number=7))
        assert [await partial(), await partial(number=3), await cache.get("7")] == [49, 9, 49]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{user}", r"key '{user}' has the field {user}, but .*load takes user_id, flag"),
        ("{user.id}", r"has the field {user\.id}, but .*load takes user_id, flag"),
        ("{}", r"has the field {}, but .*load takes user_id, flag"),
        ("{0}", r"has the field \{0\}, but"),
        ("{user_id:{width}}", r"has the field {width}, but .*load takes user_id, flag"),
        ("{", r"key '{' is not a valid template: "),
        ("}", r"is not a valid template: "),
        ("{user_id!z}", r"is not a valid template: "),
        ("{user_id.}", r"is not a valid template: "),
        ("{user_id[}", r"is not a valid template: "),
    ],
)
def test_a_template_that_does_not_fit_is_refused_at_once(sync_cache: SyncCache, template: str, message: str) -> None:
    def load(user_id: int, flag: bool = False) -> int:
        return user_id

    with pytest.raises(CacheConfigurationError, match=message):
        sync_cache.cached(key=template)(load)
    with pytest.raises(CacheConfigurationError, match=message.replace("key '", "tag '")):
        sync_cache.cached(key="fine", tags=[template])(load)


def test_a_function_without_parameters_has_no_fields(sync_cache: SyncCache) -> None:
    with pytest.raises(CacheConfigurationError, match=r"has the field {x}, but .* takes no arguments"):
        sync_cache.cached(key="{x}")(lambda: 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": "k", "ttl": 0}, ValueError, "ttl must be a positive, finite time, not 0"),
        ({"key": "k", "ttl": True}, TypeError, "ttl must be seconds"),
        ({"key": "k", "tags": "users"}, TypeError, "tags must be a list or another iterable of str"),
        ({"key": "k", "tags": [1]}, TypeError, "a tag must be a str, not 1"),
        ({"key": 5}, TypeError, "key must be a template or a function that returns the key, not 5"),
        ({"key": None}, TypeError, "key must be a template or a function"),
    ],
)
def test_options_are_checked_where_the_function_is_decorated(
    sync_cache: SyncCache, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sync_cache.cached(**options)(lambda: 1)


@pytest.mark.parametrize("thing", [5, "text", None, object()])
def test_what_cannot_be_called_cannot_be_decorated(sync_cache: SyncCache, thing: Any) -> None:
    with pytest.raises(TypeError, match=r"cached\(\) decorates a function, not "):
        sync_cache.cached(key="k")(thing)


def test_generators_cannot_be_decorated(sync_cache: SyncCache) -> None:
    def numbers() -> Iterator[int]:
        yield 1

    async def later() -> Any:
        yield 1

    for generator in (numbers, later):
        with pytest.raises(TypeError, match="cannot keep what a generator yields"):
            sync_cache.cached(key="k")(generator)


def test_a_plain_function_that_returns_a_coroutine_is_told_so(sync_cache: SyncCache) -> None:
    async def load() -> int:
        return 1

    call: Callable[[], Awaitable[int]] = lambda: load()  # noqa: E731, PLW0108 (a plain function is the point)
    with pytest.raises(TypeError, match="returned a coroutine, which cannot be cached; decorate an async def"):
        _ = sync_cache.cached(key="k")(call)()
    assert sync_cache.exists("k") is False


@pytest.mark.parametrize("key", ["", None, 5, ["list"], "\ud800"])
@pytest.mark.parametrize("shape", ["coroutine", "plain"])
async def test_a_key_function_that_returns_no_key_is_an_error_and_harms_nothing(shape: str, key: Any) -> None:
    async with a_cache() as cache:
        await cache.set("kept", 1)
        decorate = cache.cached(key=lambda: key)
        if shape == "coroutine":
            with pytest.raises(CacheKeyError, match="a cache key must"):
                await decorate(nothing)()
        else:
            with pytest.raises(CacheKeyError, match="a cache key must"):
                decorate(lambda: 1)()
        assert await cache.get("kept") == 1
        assert (await cache.statistics()).restarts == 0


async def nothing() -> None: ...


async def test_a_template_that_gives_an_empty_key_is_an_error() -> None:
    async with a_cache() as cache:
        load = cache.cached(key="{name}")(lambda name: name)
        with pytest.raises(CacheKeyError, match="a cache key must not be empty"):
            load("")
        with pytest.raises(CacheKeyError, match="a cache key must be valid Unicode"):
            load("\udfff")


def test_loads_of_two_caches_have_nothing_to_do_with_each_other(sync_cache: SyncCache) -> None:
    with open_sync_cache(settings(), stores=lambda _: MemoryStore()) as other:

        @other.cached(key="key")
        def inner() -> str:
            return "inner"

        @sync_cache.cached(key="key")
        def outer() -> str:
            return f"outer of {inner()}"

        assert outer() == "outer of inner"


async def test_a_cached_hit_needs_no_other_task() -> None:
    async with a_cache() as cache:
        load = cache.cached(key="key")(nothing)
        await load()
        coroutine = load()
        with pytest.raises(StopIteration):
            coroutine.send(None)


def test_a_cache_is_made_of_the_same_decorator_on_both_sides() -> None:
    assert inspect.signature(Cache.cached) == inspect.signature(SyncCache.cached)
