"""The two facades behind one interface, so that a test runs on both."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

from cachebus import Cache, Event, Subscription, SyncCache, open_cache, open_sync_cache
from cachebus.actors.ports import Capabilities, Gauges
from cachebus.adapters.memory.store import MemoryStore
from cachebus.bus import SYSTEM_CLOCK, Clock, ReplyPort, open_port
from cachebus.client.failure_policy import OnError
from cachebus.messages import Missing, Reply, Request
from cachebus.settings import ActorSettings, Settings


def settings(*, inline: bool = True, timeout: float = 5.0, on_error: OnError = "raise") -> Settings:
    """Return the settings of one memory backend. By default, its failures raise."""
    return Settings(timeout=timeout, on_error=on_error, actors=ActorSettings(inline_turns=inline))


def a_cache(*, clock: Clock = SYSTEM_CLOCK, inline: bool = True, **store: Any) -> Cache:
    """Open an asynchronous cache over a memory store with the options `store`."""
    return open_cache(settings(inline=inline), clock=clock, stores=lambda _: MemoryStore(clock=clock, **store))


def a_sync_cache(*, clock: Clock = SYSTEM_CLOCK, inline: bool = True, **store: Any) -> SyncCache:
    """Open a synchronous cache over a memory store with the options `store`."""
    return open_sync_cache(settings(inline=inline), clock=clock, stores=lambda _: MemoryStore(clock=clock, **store))


class Awaited:
    """A `SyncCache` whose methods can be awaited. They never suspend, so no event loop is needed."""

    def __init__(self, cache: SyncCache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._cache, name)
        if name in ("events", "cached", "link", "payloads"):
            return method

        async def call(*args: Any, **kwargs: Any) -> Any:
            return method(*args, **kwargs)

        return call

    async def scan(self, pattern: str = "*") -> AsyncIterator[str]:
        for key in self._cache.scan(pattern):
            yield key


def awaited(cache: SyncCache) -> Cache:
    """Return `cache` with the interface of a `Cache`."""
    return cast("Cache", Awaited(cache))


def heard(events: Subscription) -> list[Event]:
    """Return the events received so far."""
    out: list[Event] = []
    while len(events):
        event = events.next(0)
        assert event is not None
        out.append(event)
    return out


class SilentStore:
    """Store that does not answer until `release`, and then as if it were empty."""

    name = "silent"
    capabilities = Capabilities()

    def __init__(self) -> None:
        self._ports: list[ReplyPort] = []
        self._silent = True

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    def gauges(self) -> Gauges:
        return Gauges()

    async def execute(self, batch: Sequence[Request[Any]]) -> Sequence[Reply]:
        port = open_port()
        self._ports.append(port)
        if self._silent:
            await port.wait()
        return [Missing() for _ in batch]

    def release(self) -> None:
        """Start answering. May be called from any thread."""
        self._silent = False
        for port in self._ports:
            port.answer(None)
