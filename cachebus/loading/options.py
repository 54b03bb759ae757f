"""The options of `get_or_load`, checked."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from types import EllipsisType
from typing import Any, Literal, TypedDict, Unpack

from msgspec import Struct
from msgspec.structs import replace

from cachebus.client.validation import Duration, TimeToLive, check_seconds, check_tags, check_ttl
from cachebus.messages import Loaded, LoadMetadata, Ttl
from cachebus.payload.cached_errors import CachedFailure, check_classes

from .loaders import LoadResult

LoadTtl = TimeToLive | Callable[[Any], TimeToLive]
"""As a `TimeToLive`, or a function of the loaded value that gives one."""

Refresh = Literal["xfetch"] | float | None
"""When a live value is refreshed: by chance, the likelier the nearer its end and the longer its load (`"xfetch"`), or
after this part of its lifetime."""

WaitPolicy = Literal["load", "stale", "raise"]
"""What a caller does after it has waited for another load as long as it may."""


class ManyLoadKeywords(TypedDict, total=False):
    """The options of `get_or_load_many` beside `ttl` and `tags`. Durations are seconds or a `timedelta`."""

    stale_for: Duration
    soft_timeout: Duration | None
    hard_timeout: Duration | None
    negative_ttl: Duration | None
    ttl_jitter: float
    wait: WaitPolicy
    wait_limit: Duration
    lease_ttl: Duration


class LoadKeywords(ManyLoadKeywords, total=False):
    """The options of `get_or_load` and `cached` beside `ttl` and `tags`."""

    refresh: Refresh
    refresh_after: Duration | None
    beta: float
    idle_ttl: Duration | None
    cache_errors: Iterable[type[Exception]] | type[Exception]
    error_ttl: Duration | None


MANY_LOAD_OPTIONS = frozenset(ManyLoadKeywords.__annotations__)
LOAD_OPTIONS = frozenset(LoadKeywords.__annotations__)


class LoadOptions(Struct, frozen=True, kw_only=True):
    """The options of a load, as in `Cache.get_or_load`. Durations are seconds.

    `ttl_of` gives the `ttl` of a value, if that is no number. `is_plain` says that every value is stored with `ttl` and nothing else.
    """

    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()
    stale_for: float = 0.0
    soft_timeout: float | None = None
    hard_timeout: float | None = None
    refresh: Refresh = None
    refresh_after: float | None = None
    beta: float = 1.0
    negative_ttl: float | None = None
    ttl_jitter: float = 0.0
    idle_ttl: float | None = None
    wait: WaitPolicy = "load"
    wait_limit: float = 30.0
    lease_ttl: float = 10.0
    cache_errors: tuple[type[Exception], ...] = ()
    error_ttl: float | None = None
    ttl_of: Callable[[Any], TimeToLive] | None = None
    is_plain: bool = False

    @classmethod
    def of(cls, ttl: LoadTtl = "default", tags: Iterable[str] = (), **options: Unpack[LoadKeywords]) -> LoadOptions:
        """Return the options that a caller gave. Raises `TypeError` and `ValueError` that name the wrong one."""
        checked = () if tags == () else check_tags(tags)
        if unknown := options.keys() - LOAD_OPTIONS:
            raise TypeError(
                f"there is no option {min(unknown)!r} of loading; there are {', '.join(sorted(LOAD_OPTIONS))}"
            )
        if "cache_errors" in options:
            options["cache_errors"] = check_classes(options["cache_errors"])
        if not callable(ttl):  # A function may be another one in each call, which would fill the cache.
            with suppress(TypeError):  # An option that cannot be hashed, or is wrong: the error below names it.
                return _checked_once(ttl, checked, **options)
        return _checked(ttl, checked, **options)

    def time_to_live(self, result: LoadResult, chance: random.Random) -> Ttl:
        """Return the time to live of a loaded value: what its loader said, or else what these options say."""
        if not isinstance(result.ttl, EllipsisType):
            if self.idle_ttl is not None:
                raise ValueError(
                    "idle_ttl is capped by the ttl of the call: a LoadResult can have no ttl of its own then"
                )
            ttl = check_ttl(result.ttl)
        elif result.value is None and self.negative_ttl is not None:
            ttl = self.negative_ttl
        else:
            ttl = self.ttl if self.ttl_of is None else check_ttl(self.ttl_of(result.value))
        if isinstance(ttl, float) and self.ttl_jitter:
            ttl *= 1 - self.ttl_jitter * chance.random()
        if isinstance(ttl, float) and self.idle_ttl is not None:
            ttl = min(ttl, self.idle_ttl)
        return ttl

    def cap(self, value: object) -> float | None:
        """Return the seconds that a value may live at most, however often it is read; `None` if that is not known."""
        ttl = self.negative_ttl if value is None and self.negative_ttl is not None else self.ttl
        return ttl if isinstance(ttl, float) else None

    def recalled(self, failure: CachedFailure) -> Exception | None:
        """Return the exception that was kept, if this caller asks for such."""
        return failure.error.rebuilt(self.cache_errors) if self.cache_errors else None

    def metadata(self, load_time: float, result: LoadResult) -> LoadMetadata | None:
        """Return what is kept of the load beside the value, if anything will read it."""
        stale_for = self.stale_for
        if result.stale_for is not None:
            stale_for = check_seconds("stale_for", result.stale_for, zero=True)
        if not stale_for and self.refresh is None and self.refresh_after is None and result.etag is None:
            return None
        return LoadMetadata(load_time, stale_for, result.etag)

    def patience(self, spent: float, *, has_stale: bool, is_leader: bool) -> tuple[float | None, str]:
        """Return how long a caller goes on waiting that has `spent` seconds, and the limit that comes first: `soft`, `hard` or
        `wait`."""
        limits: list[tuple[float, str]] = []
        if self.soft_timeout is not None and has_stale:
            limits.append((max(0.0, self.soft_timeout - spent), "soft"))
        if self.hard_timeout is not None:
            limits.append((max(0.0, self.hard_timeout - spent), "hard"))
        if not is_leader:
            limits.append((max(0.0, self.wait_limit - spent), "wait"))
        return min(limits, default=(None, ""))

    def wants_refresh(self, found: Loaded, chance: random.Random) -> bool:
        """Return whether a live value is to be refreshed now.

        XFetch: Vattani, Chierichetti and Lowenstein, "Optimal Probabilistic Cache Stampede Prevention" (VLDB 2015).
        """
        left = found.ttl
        if left is None or found.lifetime is None:
            return False
        if self.refresh_after is not None and found.lifetime - left >= self.refresh_after:
            return True
        if self.refresh == "xfetch":
            # 1 - random() is never 0, whose logarithm there is none of.
            return -found.load_time * self.beta * math.log(1.0 - chance.random()) >= left
        return self.refresh is not None and found.lifetime - left >= self.refresh * found.lifetime


_DURATIONS = {
    "stale_for": (False, True),
    "soft_timeout": (True, True),
    "hard_timeout": (True, False),
    "refresh_after": (True, False),
    "negative_ttl": (True, False),
    "idle_ttl": (True, False),
    "error_ttl": (True, False),
    "wait_limit": (False, True),
    "lease_ttl": (False, False),
}
"""For each duration: whether it may be `None`, and whether it may be 0."""


def _checked(ttl: LoadTtl, tags: tuple[str, ...], **options: Any) -> LoadOptions:
    for name, (optional, zero) in _DURATIONS.items():
        if name in options and not (optional and options[name] is None):
            options[name] = check_seconds(name, options[name], zero=zero)
    given = LoadOptions(ttl="default" if callable(ttl) else check_ttl(ttl), tags=tags, **options)
    refresh, jitter, beta = given.refresh, given.ttl_jitter, given.beta
    if given.wait not in ("load", "stale", "raise"):
        raise ValueError(f"wait must be 'load', 'stale' or 'raise', not {given.wait!r}")
    if refresh is not None and refresh != "xfetch" and not (type(refresh) is float and 0 < refresh < 1):
        raise ValueError(f"refresh must be 'xfetch' or a part of the lifetime between 0 and 1, not {refresh!r}")
    if type(jitter) not in (int, float) or not 0 <= jitter < 1:
        raise ValueError(f"ttl_jitter must be a part of the ttl, from 0 to below 1, not {jitter!r}")
    if type(beta) not in (int, float) or not 0 < beta < 1e300:
        raise ValueError(f"beta must be a positive number, not {beta!r}")
    if given.idle_ttl is not None and not isinstance(given.ttl, float):
        raise ValueError("idle_ttl needs a ttl in seconds, which caps it")
    if bool(given.cache_errors) != (given.error_ttl is not None):
        raise ValueError("cache_errors and error_ttl need each other: which exceptions are kept, and for how long")
    if callable(ttl):
        return replace(given, ttl_of=ttl)
    differs = given.stale_for or jitter or given.idle_ttl or given.negative_ttl or refresh or given.refresh_after
    return given if differs else replace(given, is_plain=True)


_checked_once: Callable[..., LoadOptions] = lru_cache(maxsize=256, typed=True)(_checked)
"""Checking takes as long as storing the value. Keyed by type too: 1 and `True` are equal, and `True` is no time."""
