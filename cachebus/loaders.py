"""Loaders: what they are told, what they may answer, and how they are called."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import AsyncGeneratorType, EllipsisType, FunctionType, GeneratorType, MethodType
from typing import Any, cast

import msgspec

from cachebus.messages import CacheError

from .checks import Duration, TimeToLive, check_seconds, check_tags, check_ttl

Loader = Callable[..., Any]

LONGEST_ETAG = 1024
"""Bytes of an `etag` in UTF-8: it stands beside the value, in the head of the entry."""


class LoadContext(msgspec.Struct, frozen=True):
    """What a loader is told if it takes an argument.

    `key` is the key that is loaded; `tags` are those that the value will have. `stale` is the value that was there before,
    if `has_stale`, `etag` the version that its loader gave it, and `stale_tags` are the tags that it had. `deadline` is when whoever asked stops waiting, on the
    cache's monotonic clock; `None` where nobody does.
    """

    key: str
    tags: tuple[str, ...] = ()
    has_stale: bool = False
    stale: Any = None
    etag: str | None = None
    deadline: float | None = None
    stale_tags: tuple[str, ...] = ()


class LoadResult(msgspec.Struct, frozen=True):
    """What a loader may return instead of a bare value, to decide how it is kept.

    `ttl` and `stale_for` count instead of those of the call, `tags` in addition to them. With `store=False` the value goes
    to those who wait for it and is not kept. `etag` is its version at the source. Durations are seconds or a `timedelta`.
    Raises `TypeError` or `ValueError` for what these cannot be.
    """

    value: Any = None
    ttl: TimeToLive | EllipsisType = ...
    tags: Iterable[str] = ()
    store: bool = True
    etag: str | None = None
    stale_for: Duration | None = None
    unchanged: bool = False

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "tags", check_tags(self.tags))  # An iterator could be read only once.
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
        """The value in `LoadContext.stale` is up to date: keep it, with its tags, as if it were loaded now."""
        return cls(ttl=ttl, etag=etag, unchanged=True)

    def resolved(self, context: LoadContext) -> LoadResult:
        """Itself, with the value that `not_modified` stands for."""
        if not self.unchanged:
            return self
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


class Bare:
    """What a `LoadResult` of nothing but a value is, made in a tenth of the time."""

    __slots__ = ("value",)

    ttl = ...
    tags: tuple[str, ...] = ()
    store = True
    etag = None
    stale_for = None
    unchanged = False

    def __init__(self, value: Any) -> None:
        self.value = value


def as_result(loaded: object) -> LoadResult | Bare:
    """What a loader returned, with what it says about how to keep it. Raises `TypeError` for a generator, which only the
    first reader would find full."""
    if isinstance(loaded, LoadResult):
        _refuse_generator(loaded.value)
        return loaded
    _refuse_generator(loaded)
    return Bare(loaded)


def _refuse_generator(value: object) -> None:
    if isinstance(value, GeneratorType | AsyncGeneratorType):
        raise TypeError(f"a loader cannot bring a generator, which can be read only once: {value!r}")


def as_mapping(loaded: object) -> Mapping[str, Any]:
    """What a loader of many returned. Raises `TypeError` unless it is a mapping."""
    if not isinstance(loaded, Mapping):
        raise TypeError(f"a loader of many must return a mapping of keys to values, not a {type(loaded).__name__}")
    return cast("Mapping[str, Any]", loaded)


class LeftOut(LookupError):
    """Raised when a loader of many keys brings no value for one that was asked for alone."""


def calls_for_one(load: Loader, key: str) -> Callable[[LoadContext], Any]:
    """What asks a loader of many for one key. It raises `LeftOut` if no value comes."""

    def call(context: LoadContext) -> Any:
        loaded = load([key])
        return _awaited_one(cast("Any", loaded), key) if isinstance(loaded, Awaitable) else _one(loaded, key)

    return call


async def _awaited_one(loading: Awaitable[Any], key: str) -> Any:
    return _one(await loading, key)


def _one(loaded: object, key: str) -> Any:
    brought = as_mapping(loaded)
    if key not in brought:
        raise LeftOut(key)
    return brought[key]


def check_loader(loader: object) -> None:
    """Raise `TypeError` for what cannot be called."""
    if not callable(loader):
        raise TypeError(f"a loader must be callable, not {loader!r}")


def kind_of(loader: Loader) -> tuple[bool, bool]:
    """Whether a loader has a parameter that must be given, and whether it is a coroutine function."""
    function, bound = (loader.__func__, 1) if isinstance(loader, MethodType) else (loader, 0)
    if type(function) is FunctionType and not function.__dict__:
        # Most are this, and reading it off takes a twentieth of the time of making a signature.
        code = function.__code__
        wants = code.co_argcount - len(function.__defaults__ or ()) > bound
        return wants, bool(code.co_flags & inspect.CO_COROUTINE)
    return _wants_argument(loader), is_asynchronous(loader)


def _wants_argument(loader: Loader) -> bool:
    try:
        parameters = inspect.signature(loader).parameters.values()
    except (TypeError, ValueError):  # Written in C, and silent about its parameters.
        return False
    kinds = inspect.Parameter
    return any(
        each.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD) and each.default is kinds.empty
        for each in parameters
    )


def is_asynchronous(function: Any) -> bool:
    """Whether calling it makes something to await, as far as can be seen without calling it."""
    if type(function) is FunctionType and not function.__dict__:
        return bool(function.__code__.co_flags & inspect.CO_COROUTINE)  # In a tenth of the time.
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


async def awaited(result: Any) -> Any:
    """The result, awaited if it wants to be."""
    while isinstance(result, Awaitable):
        result = await cast("Any", result)
    return result
