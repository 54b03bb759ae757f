"""Loaders: their context, their results, and helpers to call them."""

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
"""Largest size of an `etag`, in bytes of UTF-8. It is stored in the header of the entry."""


class LoadContext(Struct, frozen=True):
    """Context of a load, passed to a loader that takes an argument.

    `key` is the key to load, and `tags` are the tags that the value will have. If `has_stale` is true, `stale` is the
    previous value, `etag` is the version that its loader gave it, and `stale_tags` are its tags. `deadline` is the time
    at which the caller stops waiting, on the cache's monotonic clock, or `None` without a `hard_timeout`.
    """

    key: str
    tags: tuple[str, ...] = ()
    has_stale: bool = False
    stale: Any = None
    etag: str | None = None
    deadline: float | None = None
    stale_tags: tuple[str, ...] = ()


class LoadResult(Struct, frozen=True):
    """A loaded value with options for storing it. A loader may return it instead of a bare value.

    `ttl` and `stale_for` replace those of the call; `tags` are added to those of the call. With `store=False`, waiters
    get the value but it is not stored. `etag` is its version at the source. Durations are seconds or a `timedelta`.

    Raises `TypeError` or `ValueError` for invalid arguments.
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
        """Return a result that keeps the value in `LoadContext.stale`, with its tags, as if it were loaded now.

        Example:
            ```python
            async def load(context: LoadContext) -> LoadResult:
                if context.has_stale:
                    return LoadResult.not_modified(ttl=60)
                return LoadResult("a report", ttl=60, etag="v1")

            assert await cache.get_or_load("report", load, stale_for=3600) == "a report"
            ```
        """
        return cls(ttl=ttl, etag=etag, unchanged=True)

    def resolved(self, context: LoadContext) -> LoadResult:
        """Return a result of `not_modified` with the value of `context`. Raises `CacheError` if it has none."""
        if not context.has_stale:
            raise CacheError("a loader returned LoadResult.not_modified(), but there is no existing value")
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
    """Return the `LoadResult` of a loader, or wrap a bare value in one.

    Raises `TypeError` for a generator, because only its first reader would get any items.
    """
    result = loaded if isinstance(loaded, LoadResult) else LoadResult(loaded)
    if issubclass(type(result.value), GeneratorType | AsyncGeneratorType):
        raise TypeError(f"a loader must not return a generator, which can be read only once: {result.value!r}")
    return result


def as_mapping(loaded: object) -> Mapping[str, Any]:
    """Return the result of a loader of many keys. Raises `TypeError` unless it is a mapping."""
    if not isinstance(loaded, Mapping):
        raise TypeError(f"a loader of many keys must return a mapping of keys to values, not {type(loaded).__name__}")
    return cast("Mapping[str, Any]", loaded)


class LeftOut(LookupError):
    """Raised when a loader of many keys, called with a single key, returns no value for it."""


def calls_for_one(load: Loader, key: str) -> Callable[[], Any]:
    """Return a loader of one key that calls a loader of many keys. It raises `LeftOut` if the key is missing."""

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
    """Return whether a loader has a required parameter, and whether it is a coroutine function.

    Raises `TypeError` if it is not callable.
    """
    function, bound = (loader.__func__, 1) if isinstance(loader, MethodType) else (loader, 0)
    if type(function) is FunctionType and not function.__dict__:
        # The common case: reading the code object takes a twentieth of the time of building a signature.
        code = function.__code__
        wants = code.co_argcount - len(function.__defaults__ or ()) > bound
        return wants, bool(code.co_flags & inspect.CO_COROUTINE)
    if not callable(loader):
        raise TypeError(f"a loader must be callable, not {loader!r}")
    kinds = inspect.Parameter
    with suppress(TypeError, ValueError):  # Some functions written in C have no signature.
        for each in inspect.signature(loader).parameters.values():
            if each.default is kinds.empty and each.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD):
                return True, is_asynchronous(loader)
    return False, is_asynchronous(loader)


def is_asynchronous(function: Any) -> bool:
    """Return True if a function or callable object is a coroutine function."""
    if type(function) is FunctionType and not function.__dict__:
        return bool(function.__code__.co_flags & inspect.CO_COROUTINE)  # Takes a tenth of the time.
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def awaited(result: Any) -> Any:
    """Await a result repeatedly until it is not awaitable, and return it."""
    while isinstance(result, Awaitable):
        result = await cast("Any", result)
    return result
