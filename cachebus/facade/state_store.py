"""State and secrets on top of a backend: values that an application relies on, where a cache may forget."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import SecretStr

from cachebus.client.background_loop import blocking
from cachebus.client.failure_policy import Health
from cachebus.client.validation import check_key, check_keys, escape_pattern
from cachebus.messages import CacheConfigurationError, CacheSerializationError, CapabilityError, Found

from .cache import Cache
from .sync_cache import SyncCache

_NOTHING: Any = object()
_FORGETFUL = ("null", "memcached")
"""Stores that evict whatever their bound."""


class StateStore:
    """Values by key over an open `Cache`, without eviction, and without expiry unless it is asked for.

    `prefix` keeps its keys apart from others in the namespace. Writing raises `CapabilityError` if the store evicts, such as a
    bounded memory backend; the `maxmemory-policy` of a Redis server has to be `noeviction`. Reading a value that is there and
    cannot be read is an error and no miss.

    Raises `CacheConfigurationError` for a cache that takes failures for misses: in an outage it would find nothing.
    """

    def __init__(self, cache: Cache, *, prefix: str = "state:") -> None:
        if cache.client.failures.on_error != "raise":
            raise CacheConfigurationError("state must not be taken for missing in an outage: say on_error='raise'")
        self._cache = cache
        self._prefix = prefix
        self._keeps = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._prefix!r} over {self._cache!r}>"

    async def get(self, key: str, default: Any = None) -> Any:
        """Return the value under `key`, or `default`. Raises `CacheSerializationError` for one that cannot be read."""
        at = self._at(key)
        found = await self._cache.lookup(at)
        if isinstance(found, Found):
            return found.value
        if await self._cache.exists(at):
            raise CacheSerializationError(f"what {type(self).__name__} holds under the key cannot be read", "content")
        return default

    async def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the values under those of `keys` that have one. Raises `CacheSerializationError` for one that cannot be read."""
        wanted = {key: self._at(key) for key in check_keys(keys)}
        found = await self._cache.get_many(wanted.values())
        for key, at in wanted.items():
            if at not in found and (value := await self.get(key, _NOTHING)) is not _NOTHING:
                found[at] = value  # Stored meanwhile.
        return {key: found[at] for key, at in wanted.items() if at in found}

    async def set(self, key: str, value: Any, *, ttl: float | None = None) -> None:
        """Store `value`, for `ttl` seconds or for ever."""
        await self._check_keeping()
        await self._cache.set(self._at(key), value, ttl=ttl)

    async def delete(self, key: str) -> bool:
        """Remove the value under `key`. Returns whether there was one."""
        return await self._cache.delete(self._at(key))

    async def list(self, prefix: str = "") -> list[str]:
        """Return the keys that begin with `prefix`, sorted."""
        found = [key async for key in self._cache.scan(f"{escape_pattern(self._prefix + prefix)}*")]
        return sorted({key.removeprefix(self._prefix) for key in found})

    async def health(self) -> Health:
        """Return whether the backend answers."""
        return await self._cache.health()

    def _at(self, key: str) -> str:
        return self._prefix + check_key(key)

    async def _check_keeping(self) -> None:
        if self._keeps:
            return
        store = await self._cache.statistics()
        bounds = [name for name in ("max_entries", "max_bytes") if getattr(store, name) is not None]
        if bounds or store.store in _FORGETFUL:
            why = f"gives values up when it is full ({', '.join(bounds)})" if bounds else "may forget at any time"
            raise CapabilityError(f"the {store.store} store {why}, and state must stay", store.store, "state")
        self._keeps = True


class SyncStateStore:
    """As `StateStore`, over a `SyncCache`."""

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
    """Texts by name over an open `Cache` whose payloads are sealed, handed out as pydantic's `SecretStr`, which hides them in `repr`.

    As in a `StateStore`, the backend must not evict, and reading a secret that cannot be opened is an error and no miss. Raises
    `CacheConfigurationError` for a cache without encryption keys.
    """

    def __init__(self, cache: Cache, *, prefix: str = "secret:") -> None:
        pipeline = cache.payloads
        if pipeline is None or not pipeline.sealed:
            raise CacheConfigurationError("a secret store needs payload.encryption_keys: it never stores plain text")
        self._store = StateStore(cache, prefix=prefix)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._store!r}>"

    async def get(self, name: str) -> SecretStr | None:
        """Return the secret of a name; `None` if there is none. Raises `CacheSerializationError` for one that cannot be opened."""
        value = await self._store.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise CacheSerializationError("what is stored under the name is no secret", "type")
        return SecretStr(value)

    async def set(self, name: str, secret: str | SecretStr, *, ttl: float | None = None) -> None:
        """Store a secret, for `ttl` seconds or for ever."""
        text = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
        if not isinstance(text, str):
            raise TypeError(f"a secret is a str or a SecretStr, not a {type(text).__name__}")
        await self._store.set(name, text, ttl=ttl)

    async def delete(self, name: str) -> bool:
        """Remove a secret. Returns whether there was one."""
        return await self._store.delete(name)

    async def list(self, prefix: str = "") -> list[str]:
        """Return the names that begin with `prefix`, sorted."""
        return await self._store.list(prefix)

    async def health(self) -> Health:
        """Return whether the backend answers."""
        return await self._store.health()


class SyncSecretStore:
    """As `SecretStore`, over a `SyncCache`."""

    def __init__(self, cache: SyncCache, *, prefix: str = "secret:") -> None:
        self._inner = SecretStore(cache.blocking_cache, prefix=prefix)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._inner!r}>"

    get = blocking(SecretStore.get)
    set = blocking(SecretStore.set)
    delete = blocking(SecretStore.delete)
    list = blocking(SecretStore.list)
    health = blocking(SecretStore.health)
