"""Creation of stores from settings. An adapter is imported only when its backend is opened."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, assert_never

from pydantic import SecretStr

from cachebus.actors.ports import BatchStore, Clock, InlineStore, LockStore
from cachebus.messages import CacheConfigurationError, CapabilityError
from cachebus.settings import BackendSettings, MemorySettings, NullSettings, PluginSettings
from cachebus.settings.backends import MemcachedSettings, RedisSettings, ServerSettings, host_and_port
from cachebus.settings.bus import BusSettings
from cachebus.settings.fields import shown
from cachebus.settings.urls import STORES


def build_store(settings: BackendSettings, *, namespace: str, clock: Clock) -> InlineStore | BatchStore:
    """Create the unopened store of a backend. Imports its adapter, so the first call may block.

    Raises `CacheConfigurationError` if a package is missing or unusable. A plugin may raise other errors.
    """
    store: Any
    match settings:
        case MemorySettings():
            options = settings.pick("max_entries", "max_bytes", "default_ttl", "policy")
            store = import_module("cachebus.adapters.memory.store").MemoryStore(**options, clock=clock)
        case NullSettings():
            store = import_module("cachebus.adapters.null").NullStore()
        case RedisSettings():
            store = _redis(settings, namespace, clock)
        case MemcachedSettings():
            store = _memcached(settings, namespace, clock)
        case PluginSettings():
            store = _plugin(settings.url, namespace, clock)
        case BusSettings():
            raise CacheConfigurationError(
                f"the store of {settings.name!r} runs in a worker on the bus, not in this process"
            )
        case _:
            assert_never(settings)
    return store  # type: ignore[no-any-return]


def build_lock_store(settings: BackendSettings, *, namespace: str, clock: Clock) -> LockStore:
    """Create the unopened lock store of a backend. Imports and errors are those of `build_store`.

    Raises `CapabilityError` if the backend does not support locks.
    """
    store: Any
    match settings:
        case MemorySettings():
            store = import_module("cachebus.adapters.memory.locks").LockTable(clock=clock)
        case RedisSettings():
            clustered = settings.topology == "cluster"
            transport = partial(_redis, settings, namespace, clock)
            locks = _adapter("redis", "locks")
            store = locks.RedisLockStore(transport, namespace=namespace, clustered=clustered)
        case MemcachedSettings():
            store = _memcached(settings, namespace, clock, "locks", "MemcachedLockStore")
        case _:
            raise CapabilityError(store=settings.type, capability="locks")
    return store  # type: ignore[no-any-return]


def _adapter(technology: str, module: str = "store") -> Any:
    """Import a module of an adapter. Raises `CacheConfigurationError` if its driver is not installed."""
    try:
        return import_module(f"cachebus.adapters.{technology}.{module}")
    except ModuleNotFoundError as error:
        raise CacheConfigurationError(
            f"{technology} needs {error.name}: pip install 'cachebus[{technology}]'"
        ) from error


def _redis(settings: RedisSettings, namespace: str, clock: Clock, **more: Any) -> Any:
    redis = _adapter("redis")
    port = 26379 if settings.topology == "sentinel" else 6379
    if settings.socket is not None:
        endpoints = [redis.Endpoint(path=settings.socket)]
    else:
        endpoints = [redis.Endpoint(*host_and_port(host, port)) for host in settings.hosts]
    connector = redis.Connector(
        clock=clock,
        identity=_credentials(redis, settings.user, settings.password),
        database=settings.database,
        tls=_tls(redis, settings),
        timeout=settings.connect_timeout,
        health_interval=settings.health_check_interval,
        window=settings.window,
        max_connections=settings.max_connections,
    )
    common: dict[str, Any] = {"namespace": namespace, "default_ttl": settings.default_ttl, **more}
    if settings.topology == "cluster":
        return import_module("cachebus.adapters.redis.cluster.store").RedisClusterStore(endpoints, connector, **common)
    return redis.RedisStore(
        endpoints,
        connector,
        **common,
        service=settings.service,
        sentinel_identity=_credentials(redis, settings.sentinel_user, settings.sentinel_password),
    )


def _memcached(
    settings: MemcachedSettings, namespace: str, clock: Clock, module: str = "store", store: str = "MemcachedStore"
) -> Any:
    memcached = _adapter("memcached")
    return getattr(_adapter("memcached", module), store)(
        [memcached.Endpoint(*host_and_port(host, 11211)) for host in settings.hosts],
        namespace=namespace,
        tls=_tls(memcached, settings),
        **settings.pick("default_ttl", "connect_timeout", "timeout", "max_connections", "chunked"),
        clock=clock,
    )


def _tls(adapter: Any, settings: ServerSettings) -> Any:
    if not settings.tls:
        return None
    return adapter.TlsFiles(ca=settings.tls_ca_file, certificate=settings.tls_cert_file, key=settings.tls_key_file)


def _credentials(redis: Any, user: str, password: SecretStr | None) -> Any:
    return redis.Credentials(user=user, password=None if password is None else password.get_secret_value())


def _plugin(url: str, namespace: str, clock: Clock) -> Any:
    scheme = url.partition("://")[0].lower()
    # An installed package and its source tree may both declare the same entry point.
    found = {each.value: each for each in entry_points(group=STORES, name=scheme)}
    if not found:
        raise CacheConfigurationError(f"no installed package provides a store for {scheme}://")
    entry = found.popitem()[1]
    if found:
        providers = " and ".join(sorted((entry.value, *found)))
        raise CacheConfigurationError(f"the scheme {scheme!r} is provided by {providers}; uninstall one of them")
    try:
        make = entry.load()
    except (ImportError, AttributeError) as error:
        raise CacheConfigurationError(
            f"the store for {scheme}:// is {entry.value}, which cannot be loaded: {error}"
        ) from error
    store: object = make(url, namespace=namespace, clock=clock)
    if isinstance(store, InlineStore | BatchStore):
        return store
    raise CacheConfigurationError(
        f"the store for {scheme}:// is {entry.value}, which returned {shown(store)} instead of an InlineStore"
        " or a BatchStore"
    )
