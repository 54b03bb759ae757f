"""Secrets on top of a backend, always sealed."""

from __future__ import annotations

from pydantic import SecretStr

from cachebus.messages import CacheConfigurationError, CacheSerializationError

from .background import blocking
from .cache import Cache, Health
from .state_store import StateStore
from .sync_cache import SyncCache


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
