"""cachebus: a cache whose every part is an actor and whose every call is a message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachebus.bus import Subscription
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
    LockNotHeld,
    Missing,
    NoSuchActor,
    Overloaded,
    RateLimited,
    RemovalCause,
    Snapshot,
    Stale,
    WrongType,
)

from .cache import Cache
from .checks import escape_pattern
from .failures import Health
from .loaders import LoadContext, LoadResult
from .node import Node
from .opening import open_cache, open_sync_cache
from .rate_limits import RateLimit
from .sync_cache import SyncCache

if TYPE_CHECKING:
    from .settings import Settings

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
    "LockNotHeld",
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
    # Settings bring pydantic with them, which takes longer to import than the rest of cachebus together.
    if name == "Settings":
        from .settings import Settings

        return Settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
