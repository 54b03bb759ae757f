"""How a value is loaded: the options of `get_or_load`, checked."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import EllipsisType
from typing import Any, Literal

import msgspec

from cachebus.messages import Loaded, LoadMetadata, Ttl

from .cached_errors import CachedError, Remembered, check_classes
from .checks import Duration, TimeToLive, check_seconds, check_tags, check_ttl
from .loaders import Bare, LoadResult

LoadTtl = TimeToLive | Callable[[Any], TimeToLive]
"""As a `TimeToLive`, or a function of the loaded value that gives one."""

ErrorClasses = Iterable[type[Exception]] | type[Exception]
"""Classes of exceptions, or one."""

Refresh = Literal["xfetch"] | float | None
"""When a live value is loaded anew: by chance, the likelier the nearer its end and the longer its load (`"xfetch"`), or
after this part of its lifetime."""

WaitPolicy = Literal["load", "stale", "raise"]
"""What becomes of a caller who has waited for somebody else's load for as long as it may."""


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a load, in the words of `Cache.get_or_load`. Durations are seconds."""

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
    """What gives the `ttl` of a value, where that is no number."""

    @classmethod
    def of(
        cls,
        ttl: LoadTtl = "default",
        tags: Iterable[str] = (),
        stale_for: Duration = 0.0,
        soft_timeout: Duration | None = None,
        hard_timeout: Duration | None = None,
        refresh: Refresh = None,
        refresh_after: Duration | None = None,
        beta: float = 1.0,
        negative_ttl: Duration | None = None,
        ttl_jitter: float = 0.0,
        idle_ttl: Duration | None = None,
        wait: WaitPolicy = "load",
        wait_limit: Duration = 30.0,
        lease_ttl: Duration = 10.0,
        cache_errors: ErrorClasses = (),
        error_ttl: Duration | None = None,
    ) -> LoadOptions:
        """The options that a caller gave. Raises `TypeError` and `ValueError` that name the wrong one."""
        given = (
            ttl, check_tags(tags), stale_for, soft_timeout, hard_timeout, refresh, refresh_after, beta, negative_ttl,
            ttl_jitter, idle_ttl, wait, wait_limit, lease_ttl, check_classes(cache_errors), error_ttl,
        )  # fmt: skip
        if callable(ttl):
            return _checked(*given)  # Mostly one of each call's own, which is not to be kept.
        try:
            return _checked_once(*given)
        except TypeError:
            return _checked(*given)  # Something that cannot be hashed, or is wrong: the error says which.

    def time_to_live(self, result: LoadResult | Bare, chance: random.Random) -> Ttl:
        """What a loaded value is given: by its own loader if that said so, else by these options."""
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
        """For how many seconds a value may live at most, however often it is asked for; `None` where that is not known."""
        ttl = self.negative_ttl if value is None and self.negative_ttl is not None else self.ttl
        return ttl if isinstance(ttl, float) else None

    def record_of(self, error: Exception) -> CachedError | None:
        """What is to be stored of a loader's exception, if anything."""
        return CachedError.of(error) if self.cache_errors and isinstance(error, self.cache_errors) else None

    def time_of_error(self, chance: random.Random) -> float:
        """The seconds for which an exception is kept."""
        return (self.error_ttl or 0.0) * (1 - self.ttl_jitter * chance.random())

    def recalled(self, remembered: Remembered) -> Exception | None:
        """The exception that was kept, if this caller asks for such."""
        return remembered.error.rebuilt(self.cache_errors) if self.cache_errors else None

    def metadata(self, load_time: float, result: LoadResult | Bare) -> LoadMetadata | None:
        """What is kept of the load beside the value, if anything will ask for it."""
        stale_for = self.stale_for
        if result.stale_for is not None:
            stale_for = check_seconds("stale_for", result.stale_for, zero=True)
        if not stale_for and self.refresh is None and self.refresh_after is None and result.etag is None:
            return None
        return LoadMetadata(load_time, stale_for, result.etag)

    def wants_refresh(self, found: Loaded, chance: random.Random) -> bool:
        """Whether a live value is to be loaded anew now.

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


def _checked(
    ttl: LoadTtl,
    tags: tuple[str, ...],
    stale_for: Duration,
    soft_timeout: Duration | None,
    hard_timeout: Duration | None,
    refresh: Refresh,
    refresh_after: Duration | None,
    beta: float,
    negative_ttl: Duration | None,
    ttl_jitter: float,
    idle_ttl: Duration | None,
    wait: WaitPolicy,
    wait_limit: Duration,
    lease_ttl: Duration,
    cache_errors: tuple[type[Exception], ...],
    error_ttl: Duration | None,
) -> LoadOptions:
    checked = LoadOptions(
        ttl="default" if callable(ttl) else check_ttl(ttl),
        ttl_of=ttl if callable(ttl) else None,
        cache_errors=cache_errors,
        error_ttl=_or_none("error_ttl", error_ttl),
        tags=tags,
        stale_for=check_seconds("stale_for", stale_for, zero=True),
        soft_timeout=_or_none("soft_timeout", soft_timeout, zero=True),
        hard_timeout=_or_none("hard_timeout", hard_timeout),
        refresh=refresh,
        refresh_after=_or_none("refresh_after", refresh_after),
        beta=beta,
        negative_ttl=_or_none("negative_ttl", negative_ttl),
        ttl_jitter=ttl_jitter,
        idle_ttl=_or_none("idle_ttl", idle_ttl),
        wait=wait,
        wait_limit=check_seconds("wait_limit", wait_limit, zero=True),
        lease_ttl=check_seconds("lease_ttl", lease_ttl),
    )
    if wait not in ("load", "stale", "raise"):
        raise ValueError(f"wait must be 'load', 'stale' or 'raise', not {wait!r}")
    if refresh is not None and refresh != "xfetch" and not (type(refresh) is float and 0 < refresh < 1):
        raise ValueError(f"refresh must be 'xfetch' or a part of the lifetime between 0 and 1, not {refresh!r}")
    if type(ttl_jitter) not in (int, float) or not 0 <= ttl_jitter < 1:
        raise ValueError(f"ttl_jitter must be a part of the ttl, from 0 to below 1, not {ttl_jitter!r}")
    if type(beta) not in (int, float) or not 0 < beta < 1e300:
        raise ValueError(f"beta must be a positive number, not {beta!r}")
    if idle_ttl is not None and not isinstance(checked.ttl, float):
        raise ValueError("idle_ttl needs a ttl in seconds, which caps it")
    if bool(cache_errors) != (error_ttl is not None):
        raise ValueError("cache_errors and error_ttl need each other: which exceptions are kept, and for how long")
    return checked


_checked_once = lru_cache(maxsize=256, typed=True)(_checked)
"""Checking takes as long as storing the value. By type, because 1 and True are equal, and `True` is no time."""


def _or_none(name: str, duration: Duration | None, *, zero: bool = False) -> float | None:
    return None if duration is None else check_seconds(name, duration, zero=zero)
