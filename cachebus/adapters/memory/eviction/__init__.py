"""Eviction: what a full memory store gives up, by rules behind `EvictionPolicy`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from cachebus.messages import CacheConfigurationError

from .classic import LfuPolicy, LruPolicy, SievePolicy
from .entry import NEVER, VISITS_MAX, Entry, EvictionPolicy, Ring, WeighedEntry
from .s3fifo import S3FifoPolicy

POLICIES: Final[dict[str, Callable[[int | None], EvictionPolicy]]] = {
    "s3fifo": S3FifoPolicy,
    "lru": LruPolicy,
    "lfu": LfuPolicy,
    "sieve": SievePolicy,
}
"""Every policy by its name in the settings; the first is the default."""


def make_policy(name: str, capacity: int | None) -> EvictionPolicy:
    """A new policy for a store of at most `capacity` entries, or of any number when only bytes bound it.

    Raises `CacheConfigurationError` when there is no policy of that name.
    """
    factory = POLICIES.get(name)
    if factory is None:
        raise CacheConfigurationError(f"eviction must be one of {', '.join(POLICIES)}, not {name!r}")
    return factory(capacity)


__all__ = ["NEVER", "POLICIES", "VISITS_MAX", "Entry", "EvictionPolicy", "Ring", "WeighedEntry", "make_policy"]
