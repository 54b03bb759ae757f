"""Validation of keys, TTLs, durations and tags that callers pass, and of cached values against a type."""

from __future__ import annotations

import functools
import math
import reprlib
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Literal, cast

from cachebus.messages import CacheKeyError, CacheSerializationError, Set, Ttl

TimeToLive = float | timedelta | Literal["default"] | None
"""Time to live, in seconds or as a `timedelta`. `"default"` is the backend's default; `None` means no expiry."""

Duration = float | timedelta
"""Duration, in seconds or as a `timedelta`."""

LONGEST = 1e9
"""Longest duration, in seconds: about thirty years."""

Since = float | timedelta | datetime | None
"""Point in time: seconds or a `timedelta` before now, or an aware `datetime`. `None` is now."""


def check_since(since: Since, now: float) -> float | None:
    """Return `since` as Unix time.

    Raises `TypeError` if it is not a time, and `ValueError` if it is in the future, not finite or a naive `datetime`.
    """
    if since is None:
        return None
    if isinstance(since, datetime):
        if since.tzinfo is None:
            raise ValueError(f"since must be a datetime with a time zone, not {since!r}")
        moment = since.timestamp()
    elif isinstance(since, timedelta):
        moment = now - since.total_seconds()
    elif type(since) in (int, float):
        moment = now - since
    else:
        raise TypeError(f"since must be seconds, a timedelta or a datetime, not {since!r}")
    if not (math.isfinite(moment) and moment <= now):
        raise ValueError(f"since must be a time in the past, not {since!r}")
    return max(moment, 0.0)


def check_key(key: object) -> str:
    """Return `key` if it is a non-empty `str` that can be encoded as UTF-8; otherwise raise `CacheKeyError`."""
    if not isinstance(key, str):
        raise CacheKeyError(f"a cache key must be a str, not {type(key).__name__}", "")
    if not key:
        raise CacheKeyError("a cache key must not be empty")
    if not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError:
            raise CacheKeyError("a cache key must be valid Unicode", reprlib.repr(key)) from None
    return key


def check_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Return `keys` as a tuple of valid keys. Raises `CacheKeyError`, also for a single `str`."""
    if isinstance(keys, str) or not isinstance(keys, Iterable):
        raise CacheKeyError("cache keys must be a list or another iterable of str", reprlib.repr(keys))
    return tuple(check_key(key) for key in keys)


def check_ttl(ttl: TimeToLive) -> Ttl:
    """Return `ttl` in seconds, `"default"` or `None`.

    Raises `TypeError` if it is not a duration, and `ValueError` if it is not positive and finite.
    """
    if type(ttl) is float and 0.0 < ttl < math.inf:
        return ttl  # Fast path for most calls.
    if ttl is None or ttl == "default":
        return cast("Ttl", ttl)
    if isinstance(ttl, timedelta):
        seconds = ttl.total_seconds()
    elif type(ttl) in (int, float):
        # An int too large for a float is rejected below, like infinity.
        seconds = float(ttl) if abs(ttl) < 1e300 else math.inf
    else:
        raise TypeError(f"ttl must be seconds, a timedelta, None or 'default', not {ttl!r}")
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"ttl must be a positive, finite time, not {ttl!r}; None means no expiry")
    return seconds


def check_seconds(name: str, duration: object, *, zero: bool = False, most: float = LONGEST) -> float:
    """Return a duration in seconds.

    Raises `TypeError` if it is not a duration, and `ValueError` if it is negative, above `most`, or 0 without `zero`.
    """
    seconds: Any = duration.total_seconds() if isinstance(duration, timedelta) else duration
    if type(seconds) not in (int, float):
        raise TypeError(f"{name} must be seconds or a timedelta, not {duration!r}")
    number = float(seconds) if abs(seconds) < 1e300 else math.inf
    if not 0 <= number <= most or (number == 0 and not zero):
        allowed = "from 0 to" if zero else "above 0 and at most"
        raise ValueError(f"{name} must be {allowed} {most:g} seconds, not {duration!r}")
    return number


def check_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Return `tags` as a tuple without duplicates.

    Raises `TypeError` or `ValueError` unless all are non-empty strings of valid Unicode, and for a single `str`.
    """
    if tags == ():
        return ()
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise TypeError(f"tags must be a list or another iterable of str, not {tags!r}")
    given = tuple(tags)
    for tag in given:
        if not isinstance(tag, str):
            raise TypeError(f"a tag must be a str, not {tag!r}")
        if not tag:
            raise ValueError("a tag must not be empty")
        try:
            tag.encode()
        except UnicodeEncodeError:
            raise ValueError(f"a tag must be valid Unicode, not {tag!r}") from None
    return tuple(dict.fromkeys(given))


def set_request(
    key: str, value: Any, ttl: TimeToLive, tags: Iterable[str], only_if: Literal["absent", "present"] | None
) -> Set:
    """Return the request for `set`. Raises `CacheKeyError`, `TypeError` or `ValueError` for invalid arguments."""
    if type(key) is not str or not key or not key.isascii():
        check_key(key)
    if only_if is not None and only_if not in ("absent", "present"):
        raise ValueError(f"only_if must be 'absent', 'present' or None, not {only_if!r}")
    seconds = ttl if type(ttl) is float and 0.0 < ttl < math.inf else check_ttl(ttl)  # On the hot path of `set`.
    return Set(key, value, seconds, check_tags(tags) if tags else (), only_if)


def escape_pattern(text: str) -> str:
    r"""Return `text` with the special characters of patterns escaped.

    Example:
        ```python
        name = "a*b"
        await cache.delete_pattern(f"user:{escape_pattern(name)}:*")
        ```
    """
    return "".join(f"\\{character}" if character in "*?[]\\^-" else character for character in text)


def fit(value: Any, kind: Any) -> Any:
    """Validate and convert a value to `kind`: a builtin or generic type, dataclass, `TypedDict` or pydantic model.

    Raises `CacheSerializationError` with the reason `type` if the value does not match. The message names the invalid
    fields but shows no values.
    """
    from pydantic import ValidationError  # Takes longer to import than the rest of cachebus.

    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        fields = [".".join(map(str, each["loc"])) or "the value" for each in error.errors(include_input=False)]
    more = f" and {len(fields) - 3} more" if len(fields) > 3 else ""
    expected = getattr(kind, "__qualname__", kind)
    raise CacheSerializationError(
        f"the cached value is not a valid {expected}; invalid: {', '.join(fields[:3])}{more}", "type"
    )


@functools.lru_cache(maxsize=256)
def _hashable_adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _adapter(kind: Any) -> Any:
    try:
        return _hashable_adapter(kind)
    except TypeError:  # Some types, such as Annotated[int, [...]], are not hashable.
        from pydantic import TypeAdapter

        return TypeAdapter(kind)
