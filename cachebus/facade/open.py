"""The two front doors: `open_cache` and `open_sync_cache`."""

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
    """Make a cache; `async with` opens it.

    `source` is a URL (`"memory://?max_entries=10000"`), a path to a YAML, TOML or JSON file, a mapping, a `Settings`, or
    nothing, for the environment (`CACHEBUS_*`) and the defaults. `options` are fields of `Settings` and win over the source:
    `open_cache("memory://", namespace="shop", timeout=0.5)`. `name` chooses among several backends; left out, it is the
    default one. `clock` and `stores` replace the source of time and the way that stores are made, for tests.

    Raises `CacheConfigurationError` for an unknown scheme, option or value, at once.
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
    """Make a cache for code without an event loop; its first use opens it. Parameters and errors are `open_cache`'s."""
    return SyncCache(_node_factory(source, options, name, clock, stores), name)


def _node_factory(
    source: Source, options: dict[str, Any], name: str | None, clock: Clock, stores: StoreFactory | None
) -> Callable[[], Node]:
    # Imported here, because pydantic takes longer to import than all of cachebus.
    from cachebus.settings import load_settings

    settings = load_settings(source, **options)
    if name is not None:
        settings.backend(name)
    return lambda: Node(settings, stores=stores, clock=clock)
