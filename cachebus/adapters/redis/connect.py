"""Connections to Redis servers: endpoints, credentials, the handshake, and a connection pool for each server."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import hiredis

from cachebus.actors.ports import SYSTEM_CLOCK, Clock
from cachebus.messages import CacheConfigurationError, CacheConnectionError, CacheError

from ..common.tls import TlsFiles
from .connection import RedisConnection, pack
from .errors import BACKEND, closed, translate_handshake_error, unreachable
from .write_script import scripts

__all__ = ["Connector", "Credentials", "Endpoint", "RedisPool", "TlsFiles", "find_master"]

Role: TypeAlias = Literal["any", "master", "sentinel"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address of a server: a host and a port, or the path of a unix socket."""

    host: str = ""
    port: int = 6379
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """User and password for a server. The user is `default` if only a password is given."""

    user: str = ""
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connector:
    """Settings and factory of connections.

    `timeout` is in seconds and covers the whole connection attempt, handshake included. `max_connections` is per
    server. `health_interval` and `window` are those of `RedisConnection`.
    """

    clock: Clock = SYSTEM_CLOCK
    identity: Credentials = Credentials()
    database: int = 0
    tls: TlsFiles | ssl.SSLContext | None = field(default=None, repr=False)
    timeout: float = 1.0
    health_interval: float | None = 2.0
    window: int = 8
    max_connections: int = 2
    counters_here: bool = True
    """True if scripts can read the tag counters. In a cluster, the counters are in another slot."""

    async def prepared(self) -> Connector:
        """Return a copy with its certificates loaded. Raises `CacheConfigurationError` if asyncio is not running."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise CacheConfigurationError("redis needs asyncio, but no asyncio event loop is running") from None
        if not isinstance(self.tls, TlsFiles):
            return self
        return replace(self, tls=await asyncio.to_thread(self.tls.context, BACKEND))

    async def connect(self, endpoint: Endpoint, role: Role = "any") -> RedisConnection:
        """Open a connection and complete its handshake. With the role `master`, reject any other server.

        Raises `CacheConnectionError`, or `CacheConfigurationError` if retrying cannot help.
        """
        try:
            async with asyncio.timeout(self.timeout):
                connection = await self._open(endpoint)
                try:
                    await self._handshake(connection, role)
                except BaseException as error:
                    connection.drop(unreachable(error, str(endpoint), self.timeout))
                    raise
        except (OSError, CacheError) as error:  # TimeoutError and SSLError are OSErrors.
            raise unreachable(error, str(endpoint), self.timeout) from None
        if role != "sentinel":
            connection.watch()
        return connection

    async def _open(self, endpoint: Endpoint) -> RedisConnection:
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"window": self.window, "health_interval": self.health_interval}
        protocol = partial(RedisConnection, str(endpoint), self.clock, **options)
        if endpoint.path:
            _, connection = await loop.create_unix_connection(protocol, endpoint.path)
        else:
            assert not isinstance(self.tls, TlsFiles), "call prepared() first"
            server_hostname = endpoint.host if self.tls else None
            _, connection = await loop.create_connection(
                protocol, endpoint.host, endpoint.port, ssl=self.tls, server_hostname=server_hostname
            )
        return connection

    async def _handshake(self, connection: RedisConnection, role: Role) -> None:
        user, password = self.identity.user or "default", self.identity.password
        commands = [pack("HELLO", 3) if password is None else pack("HELLO", 3, "AUTH", user, password)]
        if role != "sentinel":
            commands.append(pack("TIME"))
        if role == "master":
            commands.append(pack("ROLE"))
        if self.database:
            commands.append(pack("SELECT", self.database))
        needed = len(commands)
        # These replies are ignored: a user who may not load scripts can still send their text with EVAL.
        if role != "sentinel":
            commands.extend(pack("SCRIPT", "LOAD", script.text) for script in scripts(self.counters_here))
        asked_at = self.clock.monotonic()
        replies = (await connection.ask(*commands))[:needed]
        connection.handshake_done = True
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                raise translate_handshake_error(reply, connection.server)
        if role != "sentinel":
            connection.set_time(replies[1], asked_at)
        if role == "master" and replies[2][0] != b"master":
            raise CacheConnectionError(f"{connection.server} is not a master", BACKEND)


async def find_master(connector: Connector, sentinels: Sequence[Endpoint], service: str) -> Endpoint:
    """Return the endpoint of a service's master. Raises `CacheConnectionError` if no sentinel knows it."""
    reasons: list[str] = []
    for endpoint in sentinels:
        try:
            connection = await connector.connect(endpoint, "sentinel")
            try:
                async with asyncio.timeout(connector.timeout):
                    found = await connection.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
            finally:
                connection.drop(CacheConnectionError("done", BACKEND))
        except (TimeoutError, CacheConnectionError) as error:
            reasons.append(unreachable(error, str(endpoint), connector.timeout).detail)
            continue
        if found:
            host, port = found
            return Endpoint(host.decode(), int(port))
        reasons.append(f"{endpoint} does not know this service")
    raise CacheConnectionError(f"no sentinel knows the master of {service!r}: {'; '.join(reasons)}", BACKEND)


class RedisPool:
    """Pool of up to `most` connections to a server, opened on demand.

    `main` carries every request: one busy connection is the fastest, and it keeps requests in order. It may be lost.
    The other connections serve scans over many keys; with `most=1`, scans use `main` too.
    """

    def __init__(self, connect: Callable[[], Awaitable[RedisConnection]], most: int) -> None:
        self._factory = connect
        self._most = most
        self.main: RedisConnection | None = None
        self._sides: list[RedisConnection] = []
        self._next = 0
        # Connections are opened one at a time, so that their number is exact.
        self._connecting = asyncio.Lock()
        self._closed = False
        self._failures = 0
        self.connect_error: CacheError | None = None
        """The error of the last connection attempt; `None` if it succeeded."""

    def __repr__(self) -> str:
        return f"<RedisPool of {len(self.connections)}/{self._most} connections>"

    @property
    def connections(self) -> list[RedisConnection]:
        """Connections that are up."""
        return [each for each in (self.main, *self._sides) if each is not None and each.lost is None]

    def up(self) -> RedisConnection | None:
        """Return the connection for requests if it is up."""
        main = self.main
        return main if main is not None and main.lost is None else None

    async def connect(self) -> RedisConnection:
        """Return the connection for requests, connecting if needed. Raises `CacheConnectionError`."""
        failures = self._failures
        async with self._connecting:
            connection = self.up()
            if connection is None:
                if failures != self._failures and self.connect_error is not None:
                    # Another attempt failed while this one waited. A new one would take as long and fail the same way.
                    raise self.connect_error
                connection = self.main = await self._make()
            return connection

    async def ready(self) -> RedisConnection:
        """Wait until a batch can be sent, and return the connection. Raises the same errors as `connect`."""
        while True:
            connection = self.up() or await self.connect()
            try:
                await connection.room()
            except CacheError:
                continue  # Lost while waiting, and nothing was sent: connect again, or raise the reason.
            return connection

    async def side(self) -> RedisConnection:
        """Return a connection for a scan, chosen round-robin. Raises `CacheConnectionError`."""
        if self._most == 1:
            return await self.connect()
        async with self._connecting:
            self._sides = [each for each in self._sides if each.lost is None]
            idle = [each for each in self._sides if not each.in_flight]
            if not idle and len(self._sides) < self._most - 1:
                made = await self._make()
                self._sides.append(made)
                return made
            self._next += 1
            among = idle or self._sides
            return among[self._next % len(among)]

    async def close(self) -> None:
        """Wait for batches in flight, then close. If cancelled, close at once."""
        self._closed = True
        try:
            for connection in self.connections:
                await connection.drain()
        finally:
            self.drop()

    def drop(self) -> None:
        """Drop every connection at once."""
        for connection in self.connections:
            connection.drop(closed())

    async def _make(self) -> RedisConnection:
        if self._closed:
            raise closed()
        try:
            connection = await self._factory()
        except CacheError as error:
            self._failures += 1
            self.connect_error = error
            raise
        self.connect_error = None
        if self._closed:
            connection.drop(closed())
        return connection
