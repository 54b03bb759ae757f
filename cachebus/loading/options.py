"""Options of `get_or_load`: validation, and the decisions that depend on them."""

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
"""A `TimeToLive`, or a function that takes the loaded value and returns one."""

Refresh = Literal["xfetch"] | float | None
"""Time to refresh a live value: after a fraction of its lifetime, or at random (`"xfetch"`).

With `"xfetch"`, the probability grows towards expiry and with the load time.
"""

WaitPolicy = Literal["load", "stale", "raise"]
"""Action of a caller that has waited for another load for `wait_limit`."""


class ManyLoadKeywords(TypedDict, total=False):
    """Options of `get_or_load_many` other than `ttl` and `tags`. Durations are seconds or a `timedelta`."""

    stale_for: Duration
    soft_timeout: Duration | None
    hard_timeout: Duration | None
    negative_ttl: Duration | None
    ttl_jitter: float
    wait: WaitPolicy
    wait_limit: Duration
    lease_ttl: Duration


class LoadKeywords(ManyLoadKeywords, total=False):
    """Options of `get_or_load` and `cached` other than `ttl` and `tags`."""

    refresh: Refresh
    refresh_after: Duration | None
    beta: float
    idle_ttl: Duration | None
    cache_errors: Iterable[type[Exception]] | type[Exception]
    error_ttl: Duration | None


MANY_LOAD_OPTIONS = frozenset(ManyLoadKeywords.__annotations__)
LOAD_OPTIONS = frozenset(LoadKeywords.__annotations__)


class LoadOptions(Struct, frozen=True, kw_only=True):
    """Validated options of a load, see `Cache.get_or_load`. Durations are seconds.

    `ttl_of` is the function that computes the `ttl` from the value, if any. `is_plain` is true if every value is stored
    with `ttl` and no other option.
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
        """Validate the options of a call. Raises `TypeError` or `ValueError` that names the invalid option."""
        checked = () if tags == () else check_tags(tags)
        if unknown := options.keys() - LOAD_OPTIONS:
            raise TypeError(
                f"loading has no option {min(unknown)!r}; its options are {', '.join(sorted(LOAD_OPTIONS))}"
            )
        if "cache_errors" in options:
            options["cache_errors"] = check_classes(options["cache_errors"])
        if not callable(ttl):  # A new function in each call would fill the LRU cache.
            with suppress(TypeError):  # An unhashable or invalid option; in the second case, the call below raises.
                return _checked_once(ttl, checked, **options)
        return _checked(ttl, checked, **options)

    def time_to_live(self, result: LoadResult, chance: random.Random) -> Ttl:
        """Return the TTL of a loaded value, from its `LoadResult` or from these options."""
        if not isinstance(result.ttl, EllipsisType):
            if self.idle_ttl is not None:
                raise ValueError("a LoadResult must not set a ttl if the call has idle_ttl, which its own ttl caps")
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
        """Return the longest lifetime of a value, in seconds, however often it is read; `None` if unknown."""
        ttl = self.negative_ttl if value is None and self.negative_ttl is not None else self.ttl
        return ttl if isinstance(ttl, float) else None

    def recalled(self, failure: CachedFailure) -> Exception | None:
        """Return the cached exception if its class is in this caller's `cache_errors`, otherwise `None`."""
        return failure.error.rebuilt(self.cache_errors) if self.cache_errors else None

    def metadata(self, load_time: float, result: LoadResult) -> LoadMetadata | None:
        """Return the load metadata to store with the value, or `None` if no option uses it."""
        stale_for = self.stale_for
        if result.stale_for is not None:
            stale_for = check_seconds("stale_for", result.stale_for, zero=True)
        if not stale_for and self.refresh is None and self.refresh_after is None and result.etag is None:
            return None
        return LoadMetadata(load_time, stale_for, result.etag)

    def patience(self, spent: float, *, has_stale: bool, is_leader: bool) -> tuple[float | None, str]:
        """Return the remaining wait of a caller after `spent` seconds, and the limit that sets it.

        The limit is `soft`, `hard` or `wait`. Without a limit, the wait is `None`.
        """
        limits: list[tuple[float, str]] = []
        if self.soft_timeout is not None and has_stale:
            limits.append((max(0.0, self.soft_timeout - spent), "soft"))
        if self.hard_timeout is not None:
            limits.append((max(0.0, self.hard_timeout - spent), "hard"))
        if not is_leader:
            limits.append((max(0.0, self.wait_limit - spent), "wait"))
        return min(limits, default=(None, ""))

    def wants_refresh(self, found: Loaded, chance: random.Random) -> bool:
        """Return True if a live value should be refreshed now.

        XFetch: Vattani, Chierichetti and Lowenstein, "Optimal Probabilistic Cache Stampede Prevention" (VLDB 2015).
        """
        left = found.ttl
        if left is None or found.lifetime is None:
            return False
        if self.refresh_after is not None and found.lifetime - left >= self.refresh_after:
            return True
        if self.refresh == "xfetch":
            # 1 - random() is never 0, so the logarithm is defined.
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
"""Durations, with flags: may be `None`, may be 0."""


def _checked(ttl: LoadTtl, tags: tuple[str, ...], **options: Any) -> LoadOptions:
    for name, (optional, zero) in _DURATIONS.items():
        if name in options and not (optional and options[name] is None):
            options[name] = check_seconds(name, options[name], zero=zero)
    given = LoadOptions(ttl="default" if callable(ttl) else check_ttl(ttl), tags=tags, **options)
    refresh, jitter, beta = given.refresh, given.ttl_jitter, given.beta
    if given.wait not in ("load", "stale", "raise"):
        raise ValueError(f"wait must be 'load', 'stale' or 'raise', not {given.wait!r}")
    if refresh is not None and refresh != "xfetch" and not (type(refresh) is float and 0 < refresh < 1):
        raise ValueError(f"refresh must be 'xfetch' or a fraction of the lifetime between 0 and 1, not {refresh!r}")
    if type(jitter) not in (int, float) or not 0 <= jitter < 1:
        raise ValueError(f"ttl_jitter must be a fraction of the ttl, at least 0 and below 1, not {jitter!r}")
    if type(beta) not in (int, float) or not 0 < beta < 1e300:
        raise ValueError(f"beta must be a positive number, not {beta!r}")
    if given.idle_ttl is not None and not isinstance(given.ttl, float):
        raise ValueError("idle_ttl requires a ttl in seconds, which caps it")
    if bool(given.cache_errors) != (given.error_ttl is not None):
        raise ValueError("cache_errors and error_ttl must be given together")
    if callable(ttl):
        return replace(given, ttl_of=ttl)
    differs = given.stale_for or jitter or given.idle_ttl or given.negative_ttl or refresh or given.refresh_after
    return given if differs else replace(given, is_plain=True)


_checked_once: Callable[..., LoadOptions] = lru_cache(maxsize=256, typed=True)(_checked)
"""Cached, because validation takes as long as storing the value.

Typed, because 1 equals `True`, which is not a duration.
"""
