"""Eviction policies of a memory store. They implement `EvictionPolicy`."""

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
"""Eviction policies by their name in the settings. The first is the default."""


def make_policy(name: str, capacity: int | None) -> EvictionPolicy:
    """Create the policy `name` for a store of at most `capacity` entries, or `None` if only bytes limit the store.

    Raises `CacheConfigurationError` for an unknown name.
    """
    factory = POLICIES.get(name)
    if factory is None:
        raise CacheConfigurationError(f"policy must be one of {', '.join(POLICIES)}, not {name!r}")
    return factory(capacity)


__all__ = ["NEVER", "POLICIES", "VISITS_MAX", "Entry", "EvictionPolicy", "Ring", "WeighedEntry", "make_policy"]
