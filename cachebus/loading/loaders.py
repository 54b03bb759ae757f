"""Loaders: their argument, their results, and how they are called."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from types import AsyncGeneratorType, EllipsisType, FunctionType, GeneratorType, MethodType
from typing import Any, cast

from msgspec import Struct
from msgspec.structs import force_setattr

from cachebus.client.validation import Duration, TimeToLive, check_seconds, check_tags, check_ttl
from cachebus.messages import CacheError

Loader = Callable[..., Any]

LONGEST_ETAG = 1024
"""Bytes of an `etag` in UTF-8: it stands beside the value, in the head of the entry."""


class LoadContext(Struct, frozen=True):
    """The argument of a loader that takes one.

    `key` is the key that is loaded; `tags` are those that the value will have. `stale` is the value that was there before, if
    `has_stale`; `etag` is the version that its loader gave it, and `stale_tags` are the tags that it had. `deadline` is when the
    caller stops waiting, on the cache's monotonic clock; `None` if it does not.
    """

    key: str
    tags: tuple[str, ...] = ()
    has_stale: bool = False
    stale: Any = None
    etag: str | None = None
    deadline: float | None = None
    stale_tags: tuple[str, ...] = ()


class LoadResult(Struct, frozen=True):
    """A loaded value and how to keep it: a loader may return it instead of a bare value.

    `ttl` and `stale_for` count instead of those of the call, `tags` in addition to them. With `store=False` the value goes
    to its waiters and is not kept. `etag` is its version at the source. Durations are seconds or a `timedelta`.
    Raises `TypeError` or `ValueError` for wrong arguments.
    """

    value: Any = None
    ttl: TimeToLive | EllipsisType = ...
    tags: Iterable[str] = ()
    store: bool = True
    etag: str | None = None
    stale_for: Duration | None = None
    unchanged: bool = False

    def __post_init__(self) -> None:
        force_setattr(self, "tags", check_tags(self.tags))  # An iterator could be read only once.
        if not isinstance(self.ttl, EllipsisType):
            check_ttl(self.ttl)
        if self.stale_for is not None:
            check_seconds("stale_for", self.stale_for, zero=True)
        if self.etag is not None:
            _check_etag(self.etag)
        if type(self.store) is not bool:
            raise TypeError(f"store must be True or False, not {self.store!r}")

    @classmethod
    def not_modified(cls, *, ttl: TimeToLive | EllipsisType = ..., etag: str | None = None) -> LoadResult:
        """Say that the value in `LoadContext.stale` is up to date: keep it, with its tags, as if it were loaded now."""
        return cls(ttl=ttl, etag=etag, unchanged=True)

    def resolved(self, context: LoadContext) -> LoadResult:
        """Return the result with the value that `not_modified` stands for."""
        if not context.has_stale:
            raise CacheError(
                "a loader returned LoadResult.not_modified(), but there is no value that could be unchanged"
            )
        etag = self.etag or context.etag
        return LoadResult(context.stale, self.ttl, context.stale_tags, self.store, etag, self.stale_for)


def _check_etag(etag: object) -> None:
    if not isinstance(etag, str):
        raise TypeError(f"etag must be a str, not {etag!r}")
    try:
        size = len(etag.encode())
    except UnicodeEncodeError:
        raise ValueError(f"etag must be valid Unicode, not {etag!r}") from None
    if size > LONGEST_ETAG:
        raise ValueError(f"etag must have at most {LONGEST_ETAG} bytes, not {size}")


def as_result(loaded: object) -> LoadResult:
    """Return the `LoadResult` of a loader, or make one of a bare value.

    Raises `TypeError` for a generator, of which only the first reader would get anything.
    """
    result = loaded if isinstance(loaded, LoadResult) else LoadResult(loaded)
    if issubclass(type(result.value), GeneratorType | AsyncGeneratorType):
        raise TypeError(f"a loader cannot bring a generator, which can be read only once: {result.value!r}")
    return result


def as_mapping(loaded: object) -> Mapping[str, Any]:
    """Return what a loader of many returned. Raises `TypeError` unless it is a mapping."""
    if not isinstance(loaded, Mapping):
        raise TypeError(f"a loader of many must return a mapping of keys to values, not a {type(loaded).__name__}")
    return cast("Mapping[str, Any]", loaded)


class LeftOut(LookupError):
    """Raised when a loader of many keys brings no value for one that was asked for alone."""


def calls_for_one(load: Loader, key: str) -> Callable[[], Any]:
    """Return a loader of one key that calls a loader of many. It raises `LeftOut` if no value comes."""

    def only(loaded: object) -> Any:
        values = as_mapping(loaded)
        if key not in values:
            raise LeftOut(key)
        return values[key]

    async def only_awaited(loading: Awaitable[Any]) -> Any:
        return only(await loading)

    def call() -> Any:
        loaded: Any = load([key])
        return only_awaited(loaded) if hasattr(loaded, "__await__") else only(loaded)

    return call


def kind_of(loader: Loader) -> tuple[bool, bool]:
    """Return whether a loader has a parameter that must be given, and whether it is a coroutine function.

    Raises `TypeError` for what cannot be called.
    """
    function, bound = (loader.__func__, 1) if isinstance(loader, MethodType) else (loader, 0)
    if type(function) is FunctionType and not function.__dict__:
        # Most are this, and reading it off takes a twentieth of the time of making a signature.
        code = function.__code__
        wants = code.co_argcount - len(function.__defaults__ or ()) > bound
        return wants, bool(code.co_flags & inspect.CO_COROUTINE)
    if not callable(loader):
        raise TypeError(f"a loader must be callable, not {loader!r}")
    kinds = inspect.Parameter
    with suppress(TypeError, ValueError):  # Written in C, and silent about its parameters.
        for each in inspect.signature(loader).parameters.values():
            if each.default is kinds.empty and each.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
                return True, is_asynchronous(loader)
    return False, is_asynchronous(loader)


def is_asynchronous(function: Any) -> bool:
    """Return whether calling it makes something to await, as far as can be seen without calling it."""
    if type(function) is FunctionType and not function.__dict__:
        return bool(function.__code__.co_flags & inspect.CO_COROUTINE)  # In a tenth of the time.
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def awaited(result: Any) -> Any:
    """Return the result, awaited as long as it can be."""
    while isinstance(result, Awaitable):
        result = await cast("Any", result)
    return result
