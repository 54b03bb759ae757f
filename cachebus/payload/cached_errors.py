"""Cached exceptions of loaders, for the option `cache_errors` of `get_or_load`.

A JSON record with the exception's class name, arguments and attributes is stored in place of a value. For callers that
do not use `cache_errors`, the key has no value. The class is looked up only among the classes that the caller lists and
their subclasses. Nothing is imported, and no constructor is called.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

from msgspec import Struct

from cachebus.messages import Found, FoundMany, LeaseGranted, Loaded, Loading, Missing, Stale

logger = logging.getLogger("cachebus")

R = TypeVar("R")
_type_of: Callable[[Any], Any] = type
DEEPEST = 20
"""Maximum nesting depth of an argument of a cached exception."""


class _Unfit(Exception):
    """Raised for an exception that cannot be restored exactly."""


class CachedError(Struct, frozen=True):
    """A cached exception, stored in place of a value. `content` is the record."""

    content: bytes

    def __repr__(self) -> str:
        return f"<CachedError of {len(self.content)} bytes>"

    @classmethod
    def of(cls, error: Exception) -> CachedError | None:
        """Return the record of an exception. Log a warning and return `None` if it cannot be restored exactly."""
        try:
            state = dict(vars(error))
            _check_plain([*error.args, state])
            record = {"kind": _name(type(error)), "args": list(error.args), "state": state}
            made = cls(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
            again = made.rebuilt((type(error),))
            if type(again) is not type(error) or str(again) != str(error) or vars(again) != state:
                raise _Unfit("it has state outside its arguments and attributes")
        except _Unfit as why:
            logger.warning("%s is not cached: %s", type(error).__name__, why)
            return None
        except Exception as why:  # Raised by the exception's class. Its message may show values.
            logger.warning("%s is not cached: restoring it raised %s", type(error).__name__, type(why).__name__)
            return None
        return made

    def rebuilt(self, listed: Sequence[type[Exception]]) -> Exception | None:
        """Return the exception, or `None` if its class is not `listed` or the record is damaged."""
        try:
            record = json.loads(self.content.decode("utf-8", "surrogatepass"))
            kind, arguments, state = record["kind"], record["args"], record["state"]
            found = next((each for each in _derived(listed) if _name(each) == kind), None)
            if found is None:
                return None
            error = found.__new__(found, *arguments)
            error.args = tuple(arguments)
            vars(error).update(state)
        except Exception:  # The record is damaged, or the class raised an error.
            return None
        return error


class CachedFailure(Missing, frozen=True, gc=True, tag=""):
    """A `Missing` reply with the cached exception of the loader as `error`. It is never sent to another process."""

    error: CachedError


def unwrap(answer: R) -> R:
    """Convert a store's reply for callers without `cache_errors`: a cached exception does not count as a value."""
    reply: Any = answer
    shown: Any = reply
    kind = _type_of(reply)
    if kind is Loaded or kind is Found:
        if type(reply.value) is CachedError:
            shown = CachedFailure(reply.value)
    elif kind is FoundMany:
        if any(type(each.value) is CachedError for each in reply.entries.values()):
            values = {key: each for key, each in reply.entries.items() if type(each.value) is not CachedError}
            shown = FoundMany(values)
    elif kind is LeaseGranted:
        if reply.stale is not None and type(reply.stale.value) is CachedError:
            shown = LeaseGranted(reply.token)
    elif kind is Stale and type(reply.value) is CachedError:
        shown = Loading(reply.lease, reply.remaining)
    return cast("R", shown)


def check_classes(given: Iterable[type[Exception]] | type[Exception]) -> tuple[type[Exception], ...]:
    """Return the classes given as `cache_errors`. Raises `TypeError` unless all are exception classes."""
    classes: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (given,)
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, Exception)):
            raise TypeError(f"expected exception classes in cache_errors, not {each!r}")
    return classes


def _name(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _derived(listed: Iterable[type[Exception]]) -> Iterable[type[Exception]]:
    waiting, met = list(listed), set[type[Exception]]()
    while waiting:
        each = waiting.pop(0)
        if each not in met:
            met.add(each)
            yield each
            waiting += each.__subclasses__()


def _check_plain(value: Any, depth: int = 0) -> None:
    """Raise `_Unfit` for a value that JSON cannot represent exactly."""
    kind = _type_of(value)
    if value is None or kind is bool or kind is int or kind is str or (kind is float and math.isfinite(value)):
        return
    if depth > DEEPEST or not (kind is list or (kind is dict and all(type(key) is str for key in value))):
        raise _Unfit(f"it contains a {kind.__name__}, or is nested too deeply; only JSON values can be cached")
    for each in value.values() if kind is dict else value:
        _check_plain(each, depth + 1)
