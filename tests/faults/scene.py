"""A real Redis, a proxy before it, and a cache that talks to it through the proxy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio

from cachebus import Cache, CacheError, open_cache
from cachebus.node.node import StoreFactory
from cachebus.settings import load_settings
from cachebus.testing.proxy import Mode, Proxy
from cachebus.testing.servers import Server, redis_command, run_redis

DEADLINE = 1.0
"""Seconds that a call may take."""

SLACK = 0.1
"""Seconds by which a call may be late."""

RECOVERY = 2.0
"""Seconds after the server's return within which the cache works again."""

BREAKER = 0.2
"""Seconds after which the circuit tries again: so few that a recovery is not the breaker's alone."""

CALLERS = 50
NAMESPACE = "faults"
OPTIONS = "?connect_timeout=0.5&health_check_interval=0.5"


@asynccontextmanager
async def guarded(
    url: str, *, timeout: float = DEADLINE, stores: StoreFactory | None = None, **options: Any
) -> AsyncGenerator[Cache]:
    """An open cache that raises what goes wrong, with a circuit that tries again soon."""
    url += f"{'&' if '?' in url else '?'}breaker_recovery={BREAKER}"
    settings = load_settings(url, timeout=timeout, namespace=NAMESPACE, on_error="raise", **options)
    async with open_cache(settings, stores=stores) as cache:
        yield cache


@dataclass
class Scene:
    """Who takes part. `admin` is not stopped by what stops the cache."""

    server: Server
    proxy: Proxy
    cache: Cache

    async def do(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call what blocks in a thread."""
        return await anyio.to_thread.run_sync(partial(function, *arguments))

    async def tell(self, *words: str) -> bytes:
        """What the server says to a command, without the proxy."""
        told: bytes = await self.do(redis_command, self.server, *words)
        return told

    async def switch(self, mode: Mode, seconds: float = 0.0) -> None:
        """Change what the proxy does."""
        await self.do(partial(self.proxy.switch, mode, seconds=seconds))


Happening = Callable[[Scene], AbstractAsyncContextManager[None]]
"""Makes something go wrong for as long as it is entered."""


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong. `errors` are what callers may be told, besides misses; `options` are the server's.

    `forgets` says that the server loses what it has, `user` that the cache has a name and a password, `silent` that
    callers may notice nothing. `filling` is how many more keys the server has. `says` is a word that one error must have, so
    that it is known to be the server's.
    """

    name: str
    happens: Happening
    errors: frozenset[type[CacheError]]
    options: tuple[str, ...] = ()
    forgets: bool = False
    user: bool = False
    silent: bool = False
    filling: int = 0
    says: str = ""


@dataclass
class Report:
    """What came of a fault. Durations are seconds."""

    fault: Fault
    calls: int = 0
    answered: int = 0
    misses: int = 0
    errors: Counter[type[CacheError]] = field(default_factory=Counter)
    told: set[str] = field(default_factory=set)
    wrong: list[Any] = field(default_factory=list)
    longest: float = 0.0
    recovery: float = float("inf")


async def _store(cache: Cache, key: str, value: str) -> None:
    """Store a value before anything is wrong. The time that a call is given adapts to quick ones: a busy machine exceeds it."""
    with anyio.fail_after(30):
        while True:
            with contextlib.suppress(CacheError):
                await cache.set(key, value)
                return
            await asyncio.sleep(0.01)


async def play(fault: Fault, calls_each: int = 20) -> Report:
    """Let a fault happen under 50 callers, end it, and wait until the cache works again."""
    report = Report(fault)
    with ExitStack() as stack:
        server = await anyio.to_thread.run_sync(stack.enter_context, run_redis(*fault.options))
        proxy = stack.enter_context(Proxy.before(server))
        url = server.url
        if fault.user:
            redis_command(server, "ACL", "SETUSER", "app", "on", ">right", "~*", "&*", "+@all")
            url = f"redis://app:right@{server.host}:{server.port}"
        async with guarded(proxy.url(url) + OPTIONS) as cache:
            scene = Scene(server, proxy, cache)
            for start in range(0, fault.filling, 1000):
                await cache.set_many({f"filling{n}": b"x" * 50 for n in range(start, start + 1000)})
            for number in range(CALLERS):
                await _store(cache, f"k{number}", f"v{number}")
            async with fault.happens(scene), asyncio.TaskGroup() as group:
                for number in range(CALLERS):
                    group.create_task(_call(cache, number, calls_each, report))
            await _recover(cache, report)
    return report


async def _call(cache: Cache, number: int, calls: int, report: Report) -> None:
    key, highest = f"k{number}", 0
    for turn in range(calls):
        started = time.monotonic()
        report.calls += 1
        try:
            if turn % 4 == 1:
                await cache.set(key, f"v{number}")
            elif turn % 4 == 3:
                count = await cache.increment(f"n{number}")
                # A count that comes twice was another's, or is that of a request done twice.
                if count <= highest and not report.fault.forgets:
                    report.wrong.append((f"n{number}", highest, count))
                highest = count
            else:
                value = await cache.get(key)
                if value is None:
                    report.misses += 1
                elif value != f"v{number}":
                    report.wrong.append((key, value))
            report.answered += 1
        except CacheError as error:
            report.errors[type(error)] += 1
            report.told.add(str(error))
        report.longest = max(report.longest, time.monotonic() - started)
        # Callers do other things as well; and while the circuit is open a call takes no time.
        await asyncio.sleep(0.005)


async def _recover(cache: Cache, report: Report) -> None:
    """Use the cache until everybody's read, write and count is answered, and note how long that took."""
    started = time.monotonic()

    async def one(number: int) -> bool:
        try:
            await cache.set(f"k{number}", f"v{number}")
            if (value := await cache.get(f"k{number}")) != f"v{number}":
                report.wrong.append((f"k{number}", value))
            await cache.increment(f"n{number}")
        except CacheError:
            return False
        return True

    while not all(await asyncio.gather(*(one(number) for number in range(CALLERS)))):
        if time.monotonic() - started > 10 * RECOVERY:
            return
        await asyncio.sleep(0.01)
    report.recovery = time.monotonic() - started


class Admin:
    """A connection that stays open, for a server that takes no other."""

    def __init__(self, server: Server) -> None:
        self._socket = socket.create_connection((server.host, server.port), timeout=5.0)

    def tell(self, line: str) -> bytes:
        """What the server says to a command that has a short answer."""
        self._socket.sendall(f"{line}\r\n".encode())
        return self._socket.recv(65536)

    def close(self) -> None:
        """Give the connection back."""
        with contextlib.suppress(OSError):
            self._socket.close()


__all__ = ["Admin", "Fault", "Happening", "Report", "Scene", "guarded", "play"]
