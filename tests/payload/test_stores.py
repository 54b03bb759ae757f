"""State and secret stores over unbounded memory and a real Redis."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import SecretStr

from cachebus import (
    CacheClosed,
    CacheConfigurationError,
    CacheSerializationError,
    CapabilityError,
    open_cache,
    open_sync_cache,
)
from cachebus.facade.state_store import SecretStore, StateStore, SyncSecretStore, SyncStateStore
from cachebus.testing.servers import run_redis

from .pipelines import MASTER_KEY, SIGNING_KEY

UNBOUNDED = "memory://?max_entries=none"
SEALED = {"encryption_keys": {"k1": MASTER_KEY}}


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with run_redis() as server:
        yield server.url


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    return UNBOUNDED if request.param == "memory" else str(request.getfixturevalue("redis_url"))


def test_state_is_kept_read_listed_and_deleted(url: str) -> None:
    with open_sync_cache(url, on_error="raise", namespace="state") as cache:
        cache.clear()
        store, other = SyncStateStore(cache), SyncStateStore(cache, prefix="other:")
        store.set("a*", (1, None))
        store.set("a1", "one", ttl=60)
        store.set("b", None)
        assert store.get("a*") == (1, None)
        assert store.get("missing", 5) == 5
        assert store.get_many(["a*", "b", "missing"]) == {"a*": (1, None), "b": None}
        assert store.list() == ["a*", "a1", "b"]
        assert store.list("a*") == ["a*"]
        assert other.list() == []
        assert cache.ttl("state:b") is None
        assert 50 < (cache.ttl("state:a1") or 0) <= 60
        assert store.delete("b")
        assert not store.delete("b")
        assert store.health().ok
        cache.clear()


@pytest.mark.parametrize("place", ["memory://", "memory://?max_entries=none&max_bytes=1000", "null://"])
def test_state_is_not_given_to_a_store_that_forgets(place: str) -> None:
    with open_sync_cache(place, on_error="raise") as cache, pytest.raises(CapabilityError, match="cannot hold state"):
        SyncStateStore(cache).set("k", 1)


def test_an_outage_is_never_taken_for_missing_state() -> None:
    refused = pytest.raises(CacheConfigurationError, match="on_error='raise'")
    with open_sync_cache(UNBOUNDED, payload=SEALED) as cache:
        for store in (SyncStateStore, SyncSecretStore):
            with refused:
                store(cache)


def test_state_that_cannot_be_read_is_no_miss() -> None:
    with open_sync_cache(UNBOUNDED, on_error="raise", payload={"serializer": "msgpack"}) as cache:
        store = SyncStateStore(cache)
        store.set("k", [1])
        assert cache.payloads is not None
        # Written by a process with another serializer.
        cache.client._inner_set(_set("state:k", b"\x01j-\x00[1]"))  # type: ignore[attr-defined]
        assert cache.get("state:k") is None
        for read in (lambda: store.get("k", 5), lambda: store.get_many(["k"])):
            with pytest.raises(CacheSerializationError, match="cannot be decoded"):
                read()


def _set(key: str, value: Any) -> Any:
    from cachebus.messages import Set

    return Set(key, value)


def test_secrets_are_sealed_and_hidden(url: str) -> None:
    with open_sync_cache(url, on_error="raise", namespace="secrets", payload=SEALED) as cache:
        cache.clear()
        store = SyncSecretStore(cache)
        store.set("api", "the token")
        store.set("db", SecretStr("the password"), ttl=60)
        token = store.get("api")
        assert token is not None
        assert token.get_secret_value() == "the token"
        assert "token" not in repr([token, store])
        assert store.get("missing") is None
        assert store.list() == ["api", "db"]
        assert store.list("d") == ["db"]
        assert store.delete("api")
        assert store.get("api") is None
        assert store.health().ok
        with pytest.raises(TypeError, match="not bytes"):
            store.set("k", b"x")  # type: ignore[arg-type]
        cache.clear()


def test_what_lies_in_the_store_is_not_the_secret(redis_url: str) -> None:
    import redis

    with (
        open_sync_cache(redis_url, on_error="raise", namespace="lies", payload=SEALED) as cache,
        redis.Redis.from_url(redis_url) as client,
    ):
        SyncSecretStore(cache).set("api", "the token")
        held = [client.get(key) for key in client.scan_iter() if b"secret:api" in key]
        assert len(held) == 1
        assert b"token" not in held[0]
        cache.clear()


def test_a_secret_that_cannot_be_opened_is_no_miss(redis_url: str) -> None:
    with open_sync_cache(redis_url, on_error="raise", namespace="locked", payload=SEALED) as cache:
        SyncSecretStore(cache).set("api", "the token")
    with open_sync_cache(
        redis_url, on_error="raise", namespace="locked", payload={"encryption_keys": {"k2": SIGNING_KEY}}
    ) as cache:
        with pytest.raises(CacheSerializationError, match="cannot be decoded"):
            SyncSecretStore(cache).get("api")
        cache.clear()


@pytest.mark.parametrize("payload", [{}, {"serializer": "msgpack"}, {"signing_keys": [SIGNING_KEY]}])
def test_no_secret_store_exists_without_an_encryption_key(payload: dict[str, Any]) -> None:
    refused = pytest.raises(CacheConfigurationError, match="never stores plain text")
    with open_sync_cache(UNBOUNDED, on_error="raise", payload=payload) as cache, refused:
        SyncSecretStore(cache)


async def test_both_are_there_for_event_loops_too() -> None:
    cache = open_cache(UNBOUNDED, on_error="raise", payload=SEALED)
    with pytest.raises(CacheClosed):
        SecretStore(cache)
    async with cache:
        secrets, state = SecretStore(cache), StateStore(cache)
        await secrets.set("a", "x")
        await state.set("a", [1])
        found = await secrets.get("a")
        assert found is not None
        assert found.get_secret_value() == "x"
        assert await state.get_many(["a", "b"]) == {"a": [1]}
        assert await secrets.list() == await state.list() == ["a"]
        assert (await secrets.health()).ok
        assert await secrets.delete("a")
        assert await state.delete("a")
