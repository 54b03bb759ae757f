"""The rules for production: which settings are insecure, each with the field and the remedy."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any, TypeAlias

from .memcached_settings import MemcachedSettings
from .nats_settings import NatsSettings
from .redis_settings import RedisSettings, host_and_port

Path: TypeAlias = tuple[str | int, ...]


def insecurities(settings: Any) -> Iterator[tuple[Path, str]]:
    """Yield the path of each insecure setting, and what to do. Settings that are fit for production yield nothing."""
    if settings.debug:
        yield ("debug",), "writes keys to the log; leave it out in production"
    events = settings.events
    if settings.payload.encryption_keys and events.keys == "plain":
        yield ("events", "keys"), "events carry plain keys while payloads are sealed; say keys: hash or keys: none"
    if settings.payload.encryption_keys and events.keys == "hash" and events.hash_key is None:
        problem = "keys can be guessed from hashes without a secret while payloads are sealed; give one"
        yield ("events", "hash_key"), problem
    for place, backend in enumerate(settings.backends):
        if backend.type == "memory" and backend.max_entries is None and backend.max_bytes is None:
            problem = "the memory backend has no bound; give max_entries or max_bytes"
            yield ("backends", place, "max_entries"), problem
        yield from _plain_text(("backends", place), backend)
    yield from _plain_text(("locks",), settings.locks)
    yield from _plain_text(("bus",), settings.bus)


def _plain_text(at: Path, server: Any) -> Iterator[tuple[Path, str]]:
    match server:
        case RedisSettings() if not server.socket:
            remedy = "use rediss:// (tls: true)"
        case MemcachedSettings():
            remedy = "say tls: true"
        case NatsSettings():
            remedy = "use tls:// (tls: true)"
        case _:
            return
    foreign = [host for host in server.hosts if not _is_loopback(host)]
    if foreign and not (server.tls or server.allow_insecure):
        problem = (
            f"plain text to {', '.join(foreign)}; {remedy}, or say allow_insecure: true where the network is trusted"
        )
        yield (*at, "tls"), problem


def _is_loopback(host: str) -> bool:
    name = host_and_port(host, 0)[0]
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
