"""cachebus: an actor-based cache for Python, embedded in your process or run as workers behind NATS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachebus.bus import Subscription
from cachebus.client.validation import escape_pattern
from cachebus.facade.cache import Cache, Health
from cachebus.facade.open import open_cache, open_sync_cache
from cachebus.facade.rate_limiter import RateLimit
from cachebus.facade.sync_cache import SyncCache
from cachebus.loading.loaders import LoadContext, LoadResult
from cachebus.messages import (
    ActorFailed,
    AddressInUse,
    BadMessage,
    CacheBackendError,
    CacheCapacityError,
    CacheClosed,
    CacheConfigurationError,
    CacheConnectionError,
    CacheError,
    CacheInvalidationError,
    CacheKeyError,
    CacheSerializationError,
    CacheStampedeError,
    CacheTimeoutError,
    CapabilityError,
    CircuitOpen,
    Event,
    Found,
    LoaderFailed,
    LockNotAcquired,
    LockNotHeld,
    LockNotOwned,
    Missing,
    NoSuchActor,
    Overloaded,
    RateLimited,
    RemovalCause,
    Snapshot,
    Stale,
    WrongType,
)
from cachebus.node.node import Node

if TYPE_CHECKING:
    from cachebus.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "ActorFailed",
    "AddressInUse",
    "BadMessage",
    "Cache",
    "CacheBackendError",
    "CacheCapacityError",
    "CacheClosed",
    "CacheConfigurationError",
    "CacheConnectionError",
    "CacheError",
    "CacheInvalidationError",
    "CacheKeyError",
    "CacheSerializationError",
    "CacheStampedeError",
    "CacheTimeoutError",
    "CapabilityError",
    "CircuitOpen",
    "Event",
    "Found",
    "Health",
    "LoadContext",
    "LoadResult",
    "LoaderFailed",
    "LockNotAcquired",
    "LockNotHeld",
    "LockNotOwned",
    "Missing",
    "NoSuchActor",
    "Node",
    "Overloaded",
    "RateLimit",
    "RateLimited",
    "RemovalCause",
    "Settings",
    "Snapshot",
    "Stale",
    "Subscription",
    "SyncCache",
    "WrongType",
    "escape_pattern",
    "open_cache",
    "open_sync_cache",
]


def __getattr__(name: str) -> Any:
    # Settings import pydantic, which takes longer to import than the rest of cachebus.
    if name == "Settings":
        from cachebus.settings import Settings

        return Settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
