"""From settings to stores: the adapter of a backend is imported when its backend is in use, and not before."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, assert_never

from cachebus.actors.ports import BatchStore, Clock, InlineStore
from cachebus.messages import CacheConfigurationError

from .options import shown
from .settings import BackendSettings, MemorySettings, NullSettings, PluginSettings
from .urls import STORES


def build_store(settings: BackendSettings, *, namespace: str, clock: Clock) -> InlineStore | BatchStore:
    """The store that settings describe, not yet open. Imports its adapter, so it may block the first time.

    Raises `CacheConfigurationError` when the package of a plugin cannot be used; what a plugin raises besides is its
    own.
    """
    store: Any
    match settings:
        case MemorySettings():
            store = import_module("cachebus.adapters.memory").MemoryStore(
                max_entries=settings.max_entries,
                max_bytes=settings.max_bytes,
                default_ttl=settings.default_ttl,
                policy=settings.policy,
                clock=clock,
            )
        case NullSettings():
            store = import_module("cachebus.adapters.null").NullStore()
        case PluginSettings():
            store = _plugin(settings.url, namespace, clock)
        case _:
            assert_never(settings)
    return store  # type: ignore[no-any-return]


def _plugin(url: str, namespace: str, clock: Clock) -> Any:
    scheme = url.partition("://")[0].lower()
    entry = _entry(scheme)
    try:
        make = entry.load()
    except (ImportError, AttributeError) as error:
        raise CacheConfigurationError(f"the store for {scheme}:// is {entry.value}, which fails: {error}") from error
    store: object = make(url, namespace=namespace, clock=clock)
    if isinstance(store, InlineStore | BatchStore):
        return store
    raise CacheConfigurationError(
        f"the store for {scheme}:// is {entry.value}, which made {shown(store)}, neither InlineStore nor BatchStore"
    )


def _entry(scheme: str) -> EntryPoint:
    # The same entry may be announced twice: by an installed package and by its source tree.
    found = {each.value: each for each in entry_points(group=STORES, name=scheme)}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise CacheConfigurationError(
            f"the scheme {scheme!r} is announced by {' and '.join(sorted(found))}: remove one"
        )
    raise CacheConfigurationError(f"no installed package announces a store for {scheme}://")
