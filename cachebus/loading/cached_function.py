"""Cached functions: a decorator that caches the results of a function, with one load per key at a time."""

from __future__ import annotations

import functools
import inspect
import re
import string
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, ParamSpec, Protocol, TypeVar, Unpack, cast

from anyio.lowlevel import checkpoint
from msgspec import Struct

from cachebus.bus import TURNS_PER_CHECKPOINT
from cachebus.client.backend_client import BackendClient
from cachebus.client.background_loop import run
from cachebus.client.validation import check_key, check_tags
from cachebus.messages import CacheConfigurationError, Found, Get

from .coordinator import LoadCoordinator
from .leased_load import LoadJob
from .loaders import is_asynchronous
from .options import LoadKeywords, LoadOptions, LoadTtl
from .runners import AsyncRunner, Runner, ThreadRunner

P = ParamSpec("P")
T = TypeVar("T")

TURNS_OF_A_MISS = 16
"""Weight of a miss in the checkpoint counter.

A miss costs about 16 hits, and a loader that never waits adds no checkpoint.
"""

_EMPTY = inspect.Parameter.empty


class LoadingCache(Protocol):
    """Protocol of both facades. The client changes when the cache is opened or closed."""

    loads: LoadCoordinator

    @property
    def client(self) -> BackendClient: ...


def cached(
    cache: LoadingCache,
    /,
    *,
    key: str | Callable[..., str],
    ttl: LoadTtl = "default",
    tags: Iterable[str] = (),
    **options: Unpack[LoadKeywords],
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that caches the results of a function under a key built from its arguments.

    ::

        @cache.cached(key="user:{user_id}", ttl=60, tags=["users"])
        async def load_user(user_id: int) -> User: ...

    `key` is a template over the function's parameters, or a function that takes the same arguments and returns the key.
    Each tag is a template too. The options and guarantees are those of `get_or_load`. A coroutine function stays a
    coroutine function; a plain function blocks. A value that cannot be stored is still returned, and a warning is
    logged.

    Raises `CacheConfigurationError` for a template that does not match the function's parameters.
    """
    checked = LoadOptions.of(ttl, tags, **options)
    if not isinstance(key, str) and not callable(key):
        raise TypeError(f"key must be a template or a function that returns the key, not {key!r}")

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        if not callable(function):
            raise TypeError(f"cached() decorates a function, not {function!r}")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"cached() does not support generator functions, such as {function!r}")
        key_of = compile_template(function, key, "key") if isinstance(key, str) else _checked(key)
        templates = [compile_template(function, tag, "tag") for tag in checked.tags]
        made = CachedFunction(cache, function, checked, key_of, templates)
        shape = made.as_coroutine_function if is_asynchronous(function) else made.as_function
        return cast("Callable[P, T]", shape())

    return decorate


def _checked(key_of: Callable[..., str]) -> Callable[..., str]:
    return lambda *args, **kwargs: check_key(key_of(*args, **kwargs))


class CachedFunction(Struct, eq=False):
    """A decorated function with its cache, its options, and the functions that build its keys and tags."""

    cache: LoadingCache
    function: Callable[..., Any]
    options: LoadOptions
    key_of: Callable[..., str]
    tag_templates: list[Callable[..., str]]

    def as_coroutine_function(self) -> Callable[..., Any]:
        """Return the cached version of a coroutine function."""
        key_of, cache, load = self.key_of, self.cache, self._load
        slides = self.options.idle_ttl is not None
        turns_left = TURNS_PER_CHECKPOINT

        @functools.wraps(self.function)
        async def cached(*args: Any, **kwargs: Any) -> Any:
            nonlocal turns_left
            key = key_of(*args, **kwargs)
            if turns_left <= 0:
                turns_left = TURNS_PER_CHECKPOINT
                await checkpoint()  # Before the turn, as in `get_or_load`.
            client = cache.client
            request = Get(key)
            reply = client.try_inline_get(request)
            turns_left -= 1
            if type(reply) is Found and not slides:
                return reply.value
            turns_left -= TURNS_OF_A_MISS
            return await load(AsyncRunner(client), request, reply, args, kwargs)

        return cached

    def as_function(self) -> Callable[..., Any]:
        """Return the cached version of a plain function."""
        key_of, cache, load = self.key_of, self.cache, self._load
        slides = self.options.idle_ttl is not None

        @functools.wraps(self.function)
        def cached(*args: Any, **kwargs: Any) -> Any:
            client = cache.client
            request = Get(key_of(*args, **kwargs))
            reply = client.try_inline_get(request)
            if type(reply) is Found and not slides:
                return reply.value
            return run(load(ThreadRunner(client), request, reply, args, kwargs))

        return cached

    def _load(self, runner: Runner, request: Get, reply: Any, args: Any, kwargs: Any) -> Coroutine[Any, Any, Any]:
        check_key(request.key)
        # Validated again: two templates may produce the same tag, or an empty one.
        tags = check_tags([each(*args, **kwargs) for each in self.tag_templates]) if self.tag_templates else ()
        if runner.blocks:
            call = functools.partial(_not_a_coroutine, self.function, args, kwargs)
        else:
            call = functools.partial(self.function, *args, **kwargs)
        job = LoadJob(request.key, call, self.options, tags, asynchronous=not runner.blocks)
        return self.cache.loads.deliver(runner, job, request, reply)


def _not_a_coroutine(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call a plain function. Raise `TypeError` if it returns a coroutine, which only one of its callers could await."""
    result = function(*args, **kwargs)
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError(f"{function!r} returned a coroutine, which cannot be cached; decorate an async def instead")
    return result


# Templates


def compile_template(function: Callable[..., Any], template: str, what: str) -> Callable[..., str]:
    """Return a function with the parameters of `function` that fills its arguments into `template`.

    Fields are parameter names, with attributes and indices as in `str.format`: `{user_id}`, `{user.id}`, `{args[0]}`.
    Omitted arguments take their defaults, and `f(1)` and `f(user_id=1)` produce the same text. `what` names the use of
    the template in errors.

    Raises `CacheConfigurationError` for an invalid template, or a field that is not a parameter.
    """
    parameters = inspect.signature(function).parameters
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        unknown = [field for field in fields if re.split(r"[.\[]", field, maxsplit=1)[0] not in parameters]
        if not unknown:
            # A dry run finds the remaining errors: conversions, and fields within format specifications.
            template.format(**dict.fromkeys(parameters, _Anything()))
    except KeyError as error:
        unknown = [str(error.args[0])]
    except IndexError:
        unknown = [""]
    except ValueError as error:
        raise CacheConfigurationError(f"{what} {template!r} is not a valid template: {error}") from None
    if unknown:
        raise CacheConfigurationError(
            f"{what} {template!r} has the field {{{unknown[0]}}}, but {getattr(function, '__qualname__', function)}"
            f" takes {', '.join(parameters) or 'no arguments'}"
        )
    # Compiled to a lambda, because inspect.Signature.bind takes longer than an entire cache hit. Only parameter names
    # enter the source.
    defaults = {f"_default_{name}": each.default for name, each in parameters.items() if each.default is not _EMPTY}
    arguments = ", ".join(f"{name}={name}" for name in parameters)
    fill = "_fill"
    while fill in parameters:
        fill += "_"
    source = f"lambda {_parameter_list(parameters.values())}: {fill}({arguments})"
    compiled: Callable[..., str] = eval(source, {**defaults, fill: template.format})  # noqa: S307
    return compiled


class _Anything:
    """Placeholder for any argument. It has all attributes and items, and accepts any format specification."""

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __getitem__(self, key: object) -> _Anything:
        return self

    def __format__(self, specification: str) -> str:
        return ""


class _Verbatim(str):
    """A string that a signature shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def _parameter_list(parameters: Iterable[inspect.Parameter]) -> str:
    """Return the parameters as Python source, with each default replaced by the name of a variable."""
    bare = [
        each.replace(
            annotation=_EMPTY, default=_EMPTY if each.default is _EMPTY else _Verbatim(f"_default_{each.name}")
        )
        for each in parameters
    ]
    return str(inspect.Signature(bare))[1:-1]
