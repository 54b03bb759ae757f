"""Cached functions: a decorated function whose results are cached, with one load per key at a time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from anyio.lowlevel import checkpoint

from cachebus.bus import TURNS_PER_CHECKPOINT
from cachebus.messages import Found, Get, Missing, Reply

from .checks import check_key, check_tags
from .keying import compile_template
from .leased_load import LoadJob
from .link import Link, run
from .load_coordinator import LoadCoordinator
from .load_options import LoadOptions
from .loaders import is_asynchronous
from .runners import AsyncRunner, ThreadRunner

P = ParamSpec("P")
T = TypeVar("T")


TURNS_OF_A_MISS = 16
"""Weight of a miss among the turns after which an event loop lets other tasks run. A miss costs about 16 hits, and if its loader
does not wait, nothing else lets them run."""


class Decorator(Protocol):
    """Turns a function, coroutine function or plain one, into its cached self, with the same signature and types."""

    def __call__(self, function: Callable[P, T], /) -> Callable[P, T]: ...


class Linked(Protocol):
    """What has a link to a backend, which changes when it is opened or closed."""

    @property
    def link(self) -> Link: ...


class CachedFunction:
    """A function whose results are cached: where its values are, and how its arguments make keys and tags."""

    __slots__ = ("_cache", "_function", "_key_of", "_loads", "_options", "_tag_templates")

    def __init__(
        self,
        cache: Linked,
        loads: LoadCoordinator,
        function: Callable[..., Any],
        key: str | Callable[..., str],
        options: LoadOptions,
    ) -> None:
        if not callable(function):
            raise TypeError(f"cached() decorates a function, not {function!r}")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"cached() cannot keep what a generator yields, and {function!r} makes one")
        self._cache = cache
        self._loads = loads
        self._function = function
        self._options = options
        self._key_of = compile_template(function, key, "key") if isinstance(key, str) else _checked(key)
        self._tag_templates = [compile_template(function, tag, "tag") for tag in options.tags]

    def as_coroutine_function(self) -> Callable[..., Any]:
        """Return the cached function, for a coroutine function."""
        key_of, cache, load = self._key_of, self._cache, self._load
        slides = self._options.idle_ttl is not None
        turns_left = TURNS_PER_CHECKPOINT

        @functools.wraps(self._function)
        async def cached(*args: Any, **kwargs: Any) -> Any:
            nonlocal turns_left
            key = key_of(*args, **kwargs)
            if turns_left <= 0:
                turns_left = TURNS_PER_CHECKPOINT
                await checkpoint()  # Before the turn, for the reason given in `get_or_load`.
            link = cache.link
            request = Get(key)
            reply = link.turn_get(request)
            turns_left -= 1
            if type(reply) is Found and not slides:
                return reply.value
            turns_left -= TURNS_OF_A_MISS
            return await load(request, reply, link, args, kwargs)

        return cached

    async def _load(self, request: Get, reply: Any, link: Link, args: Any, kwargs: Any) -> Any:
        check_key(request.key)
        found: Any = reply if isinstance(reply, Found | Missing) else await link.finish(request, reply)
        call = functools.partial(self._function, *args, **kwargs)
        tags = self._tags_of(args, kwargs)
        job = LoadJob(request.key, call, self._options, tags, asynchronous=True, remote=not isinstance(reply, Reply))
        return await self._loads.deliver(AsyncRunner(link), job, found)

    def as_function(self) -> Callable[..., Any]:
        """Return the cached function, for a plain function."""
        key_of, cache, load = self._key_of, self._cache, self._load_in_thread
        slides = self._options.idle_ttl is not None

        @functools.wraps(self._function)
        def cached(*args: Any, **kwargs: Any) -> Any:
            link = cache.link
            request = Get(key_of(*args, **kwargs))
            reply = link.turn_get(request)
            if type(reply) is Found and not slides:
                return reply.value
            return load(request, reply, link, args, kwargs)

        return cached

    def _load_in_thread(self, request: Get, reply: Any, link: Link, args: Any, kwargs: Any) -> Any:
        check_key(request.key)
        found: Any = reply if isinstance(reply, Found | Missing) else run(link.finish_blocking(request, reply))
        call = functools.partial(_not_a_coroutine, self._function, args, kwargs)
        tags = self._tags_of(args, kwargs)
        job = LoadJob(request.key, call, self._options, tags, asynchronous=False, remote=not isinstance(reply, Reply))
        return run(self._loads.deliver(ThreadRunner(link), job, found))

    def _tags_of(self, args: Any, kwargs: Any) -> tuple[str, ...]:
        # Checked again: two templates may give the same tag, or none.
        templates = self._tag_templates
        return check_tags([each(*args, **kwargs) for each in templates]) if templates else ()


def cached(cache: Linked, loads: LoadCoordinator, *, key: str | Callable[..., str], options: LoadOptions) -> Decorator:
    """Return a decorator that caches what a function returns, under a key made of its arguments.

    `key` is a template over the function's parameters (`"user:{user_id}"`) or a function that takes its arguments and returns the
    key; each tag is a template too. The options are those of `Cache.get_or_load`, and so is what happens when several callers ask
    for the same key at the same time. A value that cannot be stored is returned all the same, with a warning in the log. Raises
    `CacheConfigurationError` for a template that does not fit the function.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        made = CachedFunction(cache, loads, function, key, options)
        shape = made.as_coroutine_function if is_asynchronous(function) else made.as_function
        return cast("Callable[P, T]", shape())

    return decorate


def _checked(key_of: object) -> Callable[..., str]:
    """Return a function of the user's that makes keys, with what it returns checked."""
    if not callable(key_of):
        raise TypeError(f"key must be a template or a function that returns the key, not {key_of!r}")
    return lambda *args, **kwargs: check_key(key_of(*args, **kwargs))


def _not_a_coroutine(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a plain function. Refuse a coroutine, which only one of the callers who share it could await."""
    result = function(*args, **kwargs)
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError(f"{function!r} returned a coroutine, which cannot be cached; decorate an async def")
    return result
