"""What is too dangerous for production: rules over the settings, each with the field and the remedy."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any, TypeAlias

from .memcached_settings import MemcachedSettings
from .nats_settings import NatsSettings
from .redis_settings import RedisSettings, host_and_port

Path: TypeAlias = tuple[str | int, ...]


def insecurities(settings: Any) -> Iterator[tuple[Path, str]]:
    """Where settings are insecure, and what to do. Nothing, if they are fit for production."""
    if settings.debug:
        yield ("debug",), "writes keys to the log; leave it out in production"
    if settings.payload.encryption_keys and settings.events.keys == "plain":
        yield ("events", "keys"), "events carry plain keys while payloads are sealed; say keys: hash or keys: none"
    if settings.payload.encryption_keys and settings.events.keys == "hash" and settings.events.hash_key is None:
        yield (
            ("events", "hash_key"),
            "keys can be guessed from hashes without a secret while payloads are sealed; give one",
        )
    for place, backend in enumerate(settings.backends):
        at: Path = ("backends", place)
        if backend.type == "memory" and backend.max_entries is None and backend.max_bytes is None:
            yield (*at, "max_entries"), "the memory backend has no bound; give max_entries or max_bytes"
        yield from _plain_store(at, backend)
    yield from _plain_store(("locks",), settings.locks)
    if settings.bus is not None:
        yield from _plain_text(("bus",), settings.bus, "use tls:// (tls: true)")


def _plain_store(at: Path, store: Any) -> Iterator[tuple[Path, str]]:
    if isinstance(store, RedisSettings) and not store.socket:
        yield from _plain_text(at, store, "use rediss:// (tls: true)")
    if isinstance(store, MemcachedSettings):
        yield from _plain_text(at, store, "say tls: true")


def _plain_text(
    at: Path, server: RedisSettings | MemcachedSettings | NatsSettings, remedy: str
) -> Iterator[tuple[Path, str]]:
    foreign = [host for host in server.hosts if not _is_loopback(host)]
    if foreign and not (server.tls or server.allow_insecure):
        yield (
            (*at, "tls"),
            f"plain text to {', '.join(foreign)}; {remedy}, or say allow_insecure: true where the network is trusted",
        )


def _is_loopback(host: str) -> bool:
    name = host_and_port(host, 0)[0]
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
