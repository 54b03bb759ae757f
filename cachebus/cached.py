"""The decorator: a function whose results are cached, with one load per key at a time in this process."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from anyio.lowlevel import checkpoint

from cachebus.bus import TURNS_PER_CHECKPOINT
from cachebus.messages import Found, Get, Missing

from .checks import check_key, check_tags
from .keying import compile_template
from .landing import Job
from .link import Link, run
from .load_options import LoadOptions
from .loaders import is_asynchronous
from .loading import Flights
from .ways import Awaiting, Blocking

P = ParamSpec("P")
T = TypeVar("T")


TURNS_OF_A_MISS = 16
"""What a miss counts for among the turns after which an event loop lets other tasks run: it takes so much longer than a hit,
and where its loader does not wait, nothing else lets them."""


class Decorator(Protocol):
    """Turns a function, coroutine function or plain one, into its cached self, with the same signature and types."""

    def __call__(self, function: Callable[P, T], /) -> Callable[P, T]: ...


class _Linked(Protocol):
    @property
    def link(self) -> Link: ...


class Loads(Flights):
    """The loads under way for one cache, and the decorator that starts them."""

    def __init__(self, cache: _Linked) -> None:
        super().__init__()
        self._cache = cache

    def cached(self, *, key: str | Callable[..., str], options: LoadOptions) -> Decorator:
        """Cache what a function returns, under a key made of its arguments.

        `key` is a template over the function's parameters (`"user:{user_id}"`) or a function that takes its arguments
        and returns the key; each tag is a template too. The options are those of `Cache.get_or_load`, and so is what
        happens when several callers ask for the same key meanwhile. A value that cannot be stored is returned all the
        same, with a warning in the log. Raises `CacheConfigurationError` for a template that does not fit the function.
        """

        def decorate(function: Callable[P, T]) -> Callable[P, T]:
            if not callable(function):
                raise TypeError(f"cached() decorates a function, not {function!r}")
            if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
                raise TypeError(f"cached() cannot keep what a generator yields, and {function!r} makes one")
            key_of = compile_template(function, key, "key") if isinstance(key, str) else _checked(key)
            tag_templates = [compile_template(function, tag, "tag") for tag in options.tags]

            def tags_of(args: Any, kwargs: Any) -> tuple[str, ...]:
                # Checked again: two templates may give the same tag, or none.
                return check_tags([each(*args, **kwargs) for each in tag_templates]) if tag_templates else ()

            make: Any = self._coroutine if is_asynchronous(function) else self._plain
            return cast("Callable[P, T]", functools.wraps(function)(make(function, key_of, tags_of, options)))

        return decorate

    def _coroutine(
        self,
        function: Callable[..., Awaitable[Any]],
        key_of: Callable[..., str],
        tags_of: Callable[[Any, Any], tuple[str, ...]],
        options: LoadOptions,
    ) -> Callable[..., Awaitable[Any]]:
        turns_left = TURNS_PER_CHECKPOINT
        slides = options.idle_ttl is not None

        async def cached(*args: Any, **kwargs: Any) -> Any:
            nonlocal turns_left
            key = key_of(*args, **kwargs)
            if turns_left <= 0:
                turns_left = TURNS_PER_CHECKPOINT
                await checkpoint()  # Before the turn, for the reason given in `get_or_load`.
            link = self._cache.link
            request = Get(key)
            reply = link.turn_get(request)
            turns_left -= 1
            if type(reply) is Found and not slides:
                return reply.value
            turns_left -= TURNS_OF_A_MISS
            return await load(request, reply, link, args, kwargs)

        async def load(request: Get, reply: Any, link: Link, args: Any, kwargs: Any) -> Any:
            # Apart, because what a function inside refers to is slower to make for each call.
            check_key(request.key)
            found: Any = reply if isinstance(reply, Found | Missing) else await link.finish(request, reply)
            tags = tags_of(args, kwargs)

            def call(context: object) -> Any:
                return function(*args, **kwargs)

            job = Job(request.key, call, options, tags, asynchronous=True, remote=reply is None)
            return await self.deliver(Awaiting(link), job, found)

        return cached

    def _plain(
        self,
        function: Callable[..., Any],
        key_of: Callable[..., str],
        tags_of: Callable[[Any, Any], tuple[str, ...]],
        options: LoadOptions,
    ) -> Callable[..., Any]:
        slides = options.idle_ttl is not None

        def cached(*args: Any, **kwargs: Any) -> Any:
            key = key_of(*args, **kwargs)
            link = self._cache.link
            request = Get(key)
            reply = link.turn_get(request)
            if type(reply) is Found and not slides:
                return reply.value
            return load(request, reply, link, args, kwargs)

        def load(request: Get, reply: Any, link: Link, args: Any, kwargs: Any) -> Any:
            check_key(request.key)
            found: Any = reply if isinstance(reply, Found | Missing) else run(link.finish_blocking(request, reply))
            tags = tags_of(args, kwargs)

            def call(context: object) -> Any:
                return _no_coroutine(function(*args, **kwargs), function)

            job = Job(request.key, call, options, tags, asynchronous=False, remote=reply is None)
            return run(self.deliver(Blocking(link), job, found))

        return cached


def _checked(key_of: object) -> Callable[..., str]:
    """A function of the user's that makes keys, with what it returns checked."""
    if not callable(key_of):
        raise TypeError(f"key must be a template or a function that returns the key, not {key_of!r}")
    return lambda *args, **kwargs: check_key(key_of(*args, **kwargs))


def _no_coroutine(outcome: Any, function: object) -> Any:
    """Refuse what could be awaited only once, by one of those who share it."""
    if inspect.iscoroutine(outcome):
        outcome.close()
        raise TypeError(f"{function!r} returned a coroutine, which cannot be cached; decorate an async def")
    return outcome
