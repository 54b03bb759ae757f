"""Functions that create caches from settings: `open_cache` and `open_sync_cache`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

from cachebus.bus import SYSTEM_CLOCK, Clock
from cachebus.node.node import Node, StoreFactory

from .cache import Cache
from .sync_cache import SyncCache

if TYPE_CHECKING:
    from cachebus.settings import Settings

Source: TypeAlias = "str | PathLike[str] | Mapping[str, Any] | Sequence[str] | Settings | None"


def open_cache(
    source: Source = None,
    *,
    name: str | None = None,
    clock: Clock = SYSTEM_CLOCK,
    stores: StoreFactory | None = None,
    **options: Any,
) -> Cache:
    """Return a cache, which `async with` opens.

    `source` is a URL (`"memory://?max_entries=10000"`), a path to a YAML, TOML or JSON file, a mapping, or a
    `Settings`. Without a source, settings come from the environment (`CACHEBUS_*`) and the defaults. `options` are
    fields of `Settings` and override the source. `name` selects one of several backends; by default, the default
    backend. `clock` and `stores` replace the clock and the store factory in tests.

    Raises:
        CacheConfigurationError: Immediately, for an unknown scheme, option or value.

    Example:
        ```python
        async with open_cache("memory://", namespace="shop", timeout=0.5) as cache:
            await cache.set("user:1", "Ada", ttl=60)
        ```
    """
    return Cache(_node_factory(source, options, name, clock, stores), name)


def open_sync_cache(
    source: Source = None,
    *,
    name: str | None = None,
    clock: Clock = SYSTEM_CLOCK,
    stores: StoreFactory | None = None,
    **options: Any,
) -> SyncCache:
    """Return a cache for code without an event loop. It opens on first use.

    The parameters and errors are those of `open_cache`.

    Example:
        ```python
        with open_sync_cache("memory://?max_entries=1000") as cache:
            cache.set("user:1", "Ada", ttl=60)
            assert cache.get("user:1") == "Ada"
        ```
    """
    return SyncCache(_node_factory(source, options, name, clock, stores), name)


def _node_factory(
    source: Source, options: dict[str, Any], name: str | None, clock: Clock, stores: StoreFactory | None
) -> Callable[[], Node]:
    # Imported here because pydantic takes longer to import than the rest of cachebus.
    from cachebus.settings import load_settings

    settings = load_settings(source, **options)
    if name is not None:
        settings.backend(name)
    return lambda: Node(settings, stores=stores, clock=clock)
