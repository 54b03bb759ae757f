"""State and secret stores: key-value stores on a cache backend that do not lose values to eviction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import SecretStr

from cachebus.client.background_loop import blocking
from cachebus.client.validation import check_key, check_keys, escape_pattern
from cachebus.messages import CacheConfigurationError, CacheSerializationError, CapabilityError, Found

from .cache import Cache, Health
from .sync_cache import SyncCache

_NOTHING: Any = object()
_EVICTING = ("null", "memcached")
"""Stores that may drop values even if they have no bound."""


class StateStore:
    """A key-value store on an open `Cache`, without eviction, and without expiry unless you pass a `ttl`.

    `prefix` separates its keys from other keys of the namespace. Writing raises `CapabilityError` if the store evicts,
    such as a bounded memory backend. Set `maxmemory-policy` to `noeviction` on a Redis server; this is not checked.
    Reading an undecodable value raises instead of reporting a miss.

    Raises `CacheConfigurationError` unless the cache has `on_error="raise"`: otherwise all state would appear missing
    during an outage.
    """

    def __init__(self, cache: Cache, *, prefix: str = "state:") -> None:
        if cache.client.failures.on_error != "raise":
            raise CacheConfigurationError(
                "a state store needs a cache with on_error='raise'; otherwise state appears missing during an outage"
            )
        self._cache = cache
        self._prefix = prefix
        self._is_checked = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._prefix!r} over {self._cache!r}>"

    async def get(self, key: str, default: Any = None) -> Any:
        """Return the value under `key`, or `default`.

        Raises `CacheSerializationError` if the value cannot be decoded.
        """
        at = self._at(key)
        found = await self._cache.lookup(at)
        if isinstance(found, Found):
            return found.value
        if await self._cache.exists(at):
            raise CacheSerializationError(
                f"the value that the {type(self).__name__} holds under the key cannot be decoded", "content"
            )
        return default

    async def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the existing values under `keys`. Raises `CacheSerializationError` if a value cannot be decoded."""
        wanted = {key: self._at(key) for key in check_keys(keys)}
        found = await self._cache.get_many(wanted.values())
        for key, at in wanted.items():
            if at not in found and (value := await self.get(key, _NOTHING)) is not _NOTHING:
                found[at] = value  # Stored between the two reads.
        return {key: found[at] for key, at in wanted.items() if at in found}

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Store `value`, for `ttl` seconds or without expiry. Raises `CapabilityError` if the store evicts."""
        await self._check_eviction()
        await self._cache.set(self._at(key), value, ttl=ttl)

    async def delete(self, key: str) -> bool:
        """Remove the value under `key`, and return whether it existed."""
        return await self._cache.delete(self._at(key))

    async def list(self, prefix: str = "") -> list[str]:
        """Return the keys that start with `prefix`, sorted."""
        found = [key async for key in self._cache.scan(f"{escape_pattern(self._prefix + prefix)}*")]
        return sorted({key.removeprefix(self._prefix) for key in found})

    async def health(self) -> Health:
        """Return the health of the backend."""
        return await self._cache.health()

    def _at(self, key: str) -> str:
        return self._prefix + check_key(key)

    async def _check_eviction(self) -> None:
        if self._is_checked:
            return
        store = await self._cache.statistics()
        bounds = [name for name in ("max_entries", "max_bytes") if getattr(store, name) is not None]
        if bounds or store.store in _EVICTING:
            why = f"evicts values when it is full ({', '.join(bounds)})" if bounds else "may drop values at any time"
            raise CapabilityError(f"the {store.store} store {why}, so it cannot hold state", store.store, "state")
        self._is_checked = True


class SyncStateStore:
    """A `StateStore` on a `SyncCache`, for code without an event loop."""

    def __init__(self, cache: SyncCache, *, prefix: str = "state:") -> None:
        self._inner = StateStore(cache.blocking_cache, prefix=prefix)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._inner!r}>"

    get = blocking(StateStore.get)
    get_many = blocking(StateStore.get_many)
    set = blocking(StateStore.set)
    delete = blocking(StateStore.delete)
    list = blocking(StateStore.list)
    health = blocking(StateStore.health)


class SecretStore:
    """A store of encrypted secrets on an open `Cache`.

    Reads return pydantic's `SecretStr`, which hides its text in `repr`. As with `StateStore`, the backend must not
    evict, and reading a secret that cannot be decrypted raises instead of reporting a miss.

    Raises `CacheConfigurationError` if the cache has no encryption keys.
    """

    def __init__(self, cache: Cache, *, prefix: str = "secret:") -> None:
        pipeline = cache.payloads
        if pipeline is None or not pipeline.sealed:
            raise CacheConfigurationError("a secret store needs payload.encryption_keys; it never stores plain text")
        self._store = StateStore(cache, prefix=prefix)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._store!r}>"

    async def get(self, name: str) -> SecretStr | None:
        """Return the secret called `name`, or `None`. Raises `CacheSerializationError` if it cannot be decrypted."""
        value = await self._store.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise CacheSerializationError("the value stored under the name is not a secret", "type")
        return SecretStr(value)

    async def set(self, name: str, secret: str | SecretStr, *, ttl: float | None = None) -> None:
        """Store a secret, for `ttl` seconds or without expiry."""
        text = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
        if not isinstance(text, str):
            raise TypeError(f"a secret must be a str or a SecretStr, not {type(text).__name__}")
        await self._store.set(name, text, ttl=ttl)

    async def delete(self, name: str) -> bool:
        """Remove a secret, and return whether it existed."""
        return await self._store.delete(name)

    async def list(self, prefix: str = "") -> list[str]:
        """Return the names that start with `prefix`, sorted."""
        return await self._store.list(prefix)

    async def health(self) -> Health:
        """Return the health of the backend."""
        return await self._store.health()


class SyncSecretStore:
    """A `SecretStore` on a `SyncCache`, for code without an event loop."""

    def __init__(self, cache: SyncCache, *, prefix: str = "secret:") -> None:
        self._inner = SecretStore(cache.blocking_cache, prefix=prefix)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._inner!r}>"

    get = blocking(SecretStore.get)
    set = blocking(SecretStore.set)
    delete = blocking(SecretStore.delete)
    list = blocking(SecretStore.list)
    health = blocking(SecretStore.health)
