"""The decorator: a function whose results are cached, with one load per key at a time in this process."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from anyio.lowlevel import checkpoint

from cachebus.bus import TURNS_PER_CHECKPOINT
from cachebus.messages import (
    CacheClosed,
    CacheError,
    Exists,
    Found,
    Get,
    LoadFailed,
    LoadStarted,
    LoadSucceeded,
    Missing,
    Present,
    Set,
    bare,
)

from .checks import TimeToLive, check_key, check_tags, check_ttl
from .flight import ABANDONED, Flight, Leading, Raised
from .keying import compile_template
from .link import Link, run

logger = logging.getLogger("cachebus")

P = ParamSpec("P")
T = TypeVar("T")


class Decorator(Protocol):
    """Turns a function, coroutine function or plain one, into its cached self, with the same signature and types."""

    def __call__(self, function: Callable[P, T], /) -> Callable[P, T]: ...


class _Linked(Protocol):
    @property
    def link(self) -> Link: ...


class Loads:
    """The loads under way for one cache, and the decorator that starts them."""

    def __init__(self, cache: _Linked) -> None:
        self._cache = cache
        self._flights: dict[str, Flight] = {}

    def forked(self) -> None:
        """Forget the loads that stayed behind in the parent, with whoever was to land them."""
        self._flights.clear()

    def cached(self, *, key: str | Callable[..., str], ttl: TimeToLive, tags: Iterable[str]) -> Decorator:
        """Cache what a function returns, under a key made of its arguments.

        `key` is a template over the function's parameters (`"user:{user_id}"`) or a function that takes its arguments
        and returns the key; each of `tags` is a template too. Callers that ask for the same key meanwhile share one call
        of the function, tasks and threads alike; what it raises they all get, and nothing is stored. If the calling one
        is cancelled, another calls anew. A value that cannot be stored is returned all the same, with a warning in the
        log. Raises `CacheConfigurationError` for a template that does not fit the function.
        """
        checked_ttl = check_ttl(ttl)
        checked_tags = check_tags(tags)

        def decorate(function: Callable[P, T]) -> Callable[P, T]:
            if not callable(function):
                raise TypeError(f"cached() decorates a function, not {function!r}")
            if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
                raise TypeError(f"cached() cannot keep what a generator yields, and {function!r} makes one")
            key_of = compile_template(function, key, "key") if isinstance(key, str) else _checked(key)
            tag_templates = [compile_template(function, tag, "tag") for tag in checked_tags]

            def request_to_store(at: str, value: Any, args: Any, kwargs: Any) -> Set:
                # Checked again: two templates may give the same tag, or none.
                return Set(at, value, checked_ttl, check_tags([each(*args, **kwargs) for each in tag_templates]))

            call: Any = function
            # The second is a callable object whose class has `async def __call__`.
            if inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__):
                wrapped: Any = self._coroutine(call, key_of, request_to_store)
            else:
                wrapped = self._plain(function, key_of, request_to_store)
            return cast("Callable[P, T]", functools.wraps(function)(wrapped))

        return decorate

    def _coroutine(
        self,
        function: Callable[..., Awaitable[Any]],
        key_of: Callable[..., str],
        request_to_store: Callable[..., Set],
    ) -> Callable[..., Awaitable[Any]]:
        turns_left = TURNS_PER_CHECKPOINT

        async def cached(*args: Any, **kwargs: Any) -> Any:
            nonlocal turns_left
            key = key_of(*args, **kwargs)
            link = self._cache.link
            request = bare(Get)
            request.key = key
            reply = link.turn_get(request)
            turns_left -= 1
            if type(reply) is Found and turns_left > 0:
                return reply.value
            if turns_left <= 0:
                turns_left = TURNS_PER_CHECKPOINT
                await checkpoint()
            if type(reply) is Found:
                return reply.value
            check_key(key)
            if type(reply) is not Missing and isinstance(reply := await link.finish(request, reply), Found):
                return reply.value
            while True:
                flight = Flight()
                if (other := self._flights.setdefault(key, flight)) is not flight:
                    if (value := await other.wait()) is not ABANDONED:
                        return value
                    continue
                outcome: Any = ABANDONED
                try:
                    with Leading(flight):
                        # Looked up again: another flight may have landed between the miss and this one's start. Asked
                        # whether it exists first, which counts neither as hit nor as miss.
                        if isinstance(await link.request(Exists(key)), Present):
                            again = await link.request(Get(key))
                            outcome = again.value if isinstance(again, Found) else ABANDONED
                        if outcome is ABANDONED:
                            with _Report(link, key):
                                outcome = await function(*args, **kwargs)
                            with _StoringIsOptional():
                                await link.request(request_to_store(key, outcome, args, kwargs))
                    return outcome
                except Exception as error:
                    outcome = Raised(error)
                    raise
                finally:
                    self._flights.pop(key, None)  # It is not there in the child of a fork.
                    flight.land(outcome)

        return cached

    def _plain(
        self, function: Callable[..., Any], key_of: Callable[..., str], request_to_store: Callable[..., Set]
    ) -> Callable[..., Any]:
        def cached(*args: Any, **kwargs: Any) -> Any:
            key = key_of(*args, **kwargs)
            link = self._cache.link
            request = bare(Get)
            request.key = key
            reply = link.turn_get(request)
            if type(reply) is Found:
                return reply.value
            check_key(key)
            if type(reply) is not Missing and isinstance(reply := run(link.finish_blocking(request, reply)), Found):
                return reply.value
            while True:
                flight = Flight()
                if (other := self._flights.setdefault(key, flight)) is not flight:
                    if (value := other.wait_in_thread()) is not ABANDONED:
                        return value
                    continue
                outcome: Any = ABANDONED
                try:
                    with Leading(flight):
                        if isinstance(run(link.request_blocking(Exists(key))), Present):
                            again = run(link.request_blocking(Get(key)))
                            outcome = again.value if isinstance(again, Found) else ABANDONED
                        if outcome is ABANDONED:
                            with _Report(link, key):
                                outcome = _no_coroutine(function(*args, **kwargs), function)
                            with _StoringIsOptional():
                                run(link.request_blocking(request_to_store(key, outcome, args, kwargs)))
                    return outcome
                except Exception as error:
                    outcome = Raised(error)
                    raise
                finally:
                    self._flights.pop(key, None)  # It is not there in the child of a fork.
                    flight.land(outcome)

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


class _Report:
    """The events of one load."""

    __slots__ = ("_emitter", "_key", "_now", "_started")

    def __init__(self, link: Link, key: str) -> None:
        self._emitter = link.emitter
        self._now = link.bus.clock.monotonic
        self._key = key

    def __enter__(self) -> None:
        self._started = self._now()
        if LoadStarted in self._emitter.audience.kinds:
            self._emitter.emit(LoadStarted(key=self._key))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        duration = self._now() - self._started
        if kind is None:
            if LoadSucceeded in self._emitter.audience.kinds:
                self._emitter.emit(LoadSucceeded(key=self._key, duration=duration))
        elif LoadFailed in self._emitter.audience.kinds:
            self._emitter.emit(LoadFailed(key=self._key, error=kind.__name__, duration=duration))


class _StoringIsOptional:
    """A value that was loaded belongs to its callers, whether it can be stored or not."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> bool:
        if isinstance(error, CacheError) and not isinstance(error, CacheClosed):
            logger.warning("a loaded value was not stored: %s", error.code)
            return True
        return False
