"""Decorated functions of all kinds: their keys, and functions that cannot be decorated."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from cachebus import (
    Cache,
    CacheConfigurationError,
    CacheKeyError,
    SyncCache,
    open_sync_cache,
)
from cachebus.adapters.memory.store import MemoryStore
from cachebus.loading.options import LOAD_OPTIONS, LoadOptions

from .faces import a_cache, settings


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
    """Return the key under which `function(*args, **kwargs)` is stored."""
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
        with pytest.raises(TypeError, match="does not support generator functions"):
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


async def test_a_misspelled_option_is_an_error_on_a_hit_too() -> None:
    wrong: Any = {"stale_fro": 5}
    not_for_many: Any = {"refresh": 0.5}
    async with a_cache() as cache:
        await cache.set("k", 1)
        with pytest.raises(TypeError, match="no option 'stale_fro'"):
            await cache.get_or_load("k", nothing, **wrong)
        with pytest.raises(TypeError, match="no option 'stale_fro'"):
            await cache.get_or_load_many(["k"], nothing, **wrong)
        with pytest.raises(TypeError, match="no option 'refresh'"):
            await cache.get_or_load_many(["k"], nothing, **not_for_many)
        with pytest.raises(TypeError, match="no option 'stale_fro'"):
            cache.cached(key="k", **wrong)


def test_every_option_of_loading_is_a_keyword() -> None:
    fields = set(LoadOptions.__struct_fields__) - {"ttl", "tags", "ttl_of", "is_plain"}
    assert fields == LOAD_OPTIONS
