"""Exceptions of loaders that are cached, for callers who ask for that: `cache_errors` of `get_or_load`.

A record is stored in the place of a value: the name of the exception's class, its arguments and its attributes, as JSON. To
callers who did not ask for exceptions the key has no value. A class is looked up only among those that the caller has listed,
and their subclasses; nothing is imported and no constructor is run.
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
"""Containers in containers that an argument of an exception may have."""


class _Unfit(Exception):
    """Raised for an exception that would not come back as it was."""


class CachedError(Struct, frozen=True):
    """An exception in the place of a value: `content` is the record."""

    content: bytes

    def __repr__(self) -> str:
        return f"<CachedError of {len(self.content)} bytes>"

    @classmethod
    def of(cls, error: Exception) -> CachedError | None:
        """Return the record of an exception; `None`, with a warning, if it would not come back as it was."""
        try:
            state = dict(vars(error))
            _check_plain([*error.args, state])
            record = {"kind": _name(type(error)), "args": list(error.args), "state": state}
            made = cls(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
            again = made.rebuilt((type(error),))
            if type(again) is not type(error) or str(again) != str(error) or vars(again) != state:
                raise _Unfit("it keeps something where nobody can see it")
        except _Unfit as why:
            logger.warning("%s is not cached: %s", type(error).__name__, why)
            return None
        except Exception as why:  # Of the class itself. Its text may show values.
            logger.warning("%s is not cached: %s when it was read back", type(error).__name__, type(why).__name__)
            return None
        return made

    def rebuilt(self, listed: Sequence[type[Exception]]) -> Exception | None:
        """Return the exception if it is of one of the `listed` classes; else `None`, also for a broken record."""
        try:
            record = json.loads(self.content.decode("utf-8", "surrogatepass"))
            kind, arguments, state = record["kind"], record["args"], record["state"]
            found = next((each for each in _derived(listed) if _name(each) == kind), None)
            if found is None:
                return None
            error = found.__new__(found, *arguments)
            error.args = tuple(arguments)
            vars(error).update(state)
        except Exception:  # Any error of the bytes or of the class.
            return None
        return error


class CachedFailure(Missing, frozen=True, gc=True, tag=""):
    """A `Missing` whose `error` is what the loader of the key raised. It is never sent to another process."""

    error: CachedError


def unwrap(answer: R) -> R:
    """Return the reply of a store as the caller sees it: a cached exception is no value."""
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
    """Return the classes of `cache_errors`. Raises `TypeError` for anything but classes of exceptions."""
    classes: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (given,)
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, Exception)):
            raise TypeError(f"cache_errors must be classes of exceptions, not {each!r}")
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
    """Raise `_Unfit` for what JSON would change."""
    kind = _type_of(value)
    if value is None or kind is bool or kind is int or kind is str or (kind is float and math.isfinite(value)):
        return
    if depth > DEEPEST or not (kind is list or (kind is dict and all(type(key) is str for key in value))):
        raise _Unfit(f"it holds a {kind.__name__}, and only what JSON can say is kept of an exception")
    for each in value.values() if kind is dict else value:
        _check_plain(each, depth + 1)
