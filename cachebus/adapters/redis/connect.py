"""Making and keeping connections to Redis servers: endpoints, credentials, the greeting, and a pool for each server."""

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
from .errors import BACKEND, closed, translate_greeting, unreachable
from .write_script import scripts

__all__ = ["Connector", "Credentials", "Endpoint", "RedisPool", "TlsFiles", "find_master"]

Role: TypeAlias = Literal["any", "master", "sentinel"]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens: a host and a port, or the path of a unix socket."""

    host: str = ""
    port: int = 6379
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A user of the server's, `default` if only a password is given."""

    user: str = ""
    password: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connector:
    """Makes connections, at most `max_connections` to a server. `timeout` is in seconds and holds for all of connecting;
    `health_interval` and `window` as in `RedisConnection`."""

    clock: Clock = SYSTEM_CLOCK
    identity: Credentials = Credentials()
    database: int = 0
    tls: TlsFiles | ssl.SSLContext | None = field(default=None, repr=False)
    timeout: float = 1.0
    health_interval: float | None = 2.0
    window: int = 8
    max_connections: int = 2
    counters_here: bool = True
    """Whether the scripts read the counters of tags, which in a cluster are in another slot."""

    async def prepared(self) -> Connector:
        """The same, with the certificates read. Raises `CacheConfigurationError` under another event loop than asyncio's."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise CacheConfigurationError("redis needs an asyncio event loop, and this is another's") from None
        if not isinstance(self.tls, TlsFiles):
            return self
        return replace(self, tls=await asyncio.to_thread(self.tls.context, BACKEND))

    async def connect(self, place: Endpoint, role: Role = "any") -> RedisConnection:
        """A connection that is ready. As a `master`, a server that is none is refused. Raises `CacheConnectionError`,
        or `CacheConfigurationError` for what another attempt will not mend."""
        try:
            async with asyncio.timeout(self.timeout):
                connection = await self._open(place)
                try:
                    await self._handshake(connection, role)
                except BaseException as error:
                    connection.drop(unreachable(error, str(place), self.timeout))
                    raise
        except (OSError, CacheError) as error:  # TimeoutError and SSLError are OSErrors.
            raise unreachable(error, str(place), self.timeout) from None
        if role != "sentinel":
            connection.watch()
        return connection

    async def _open(self, place: Endpoint) -> RedisConnection:
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"window": self.window, "health_interval": self.health_interval}
        protocol = partial(RedisConnection, str(place), self.clock, **options)
        if place.path:
            _, connection = await loop.create_unix_connection(protocol, place.path)
        else:
            assert not isinstance(self.tls, TlsFiles), "the connector is prepared"
            server_hostname = place.host if self.tls else None
            _, connection = await loop.create_connection(
                protocol, place.host, place.port, ssl=self.tls, server_hostname=server_hostname
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
        # A user without the right to load scripts may still send them whole, so these replies do not matter.
        if role != "sentinel":
            commands.extend(pack("SCRIPT", "LOAD", script.text) for script in scripts(self.counters_here))
        asked_at = self.clock.monotonic()
        replies = (await connection.ask(*commands))[:needed]
        connection.greeted = True
        for reply in replies:
            if isinstance(reply, hiredis.ReplyError):
                raise translate_greeting(reply, connection.server)
        if role != "sentinel":
            connection.set_time(replies[1], asked_at)
        if role == "master" and replies[2][0] != b"master":
            raise CacheConnectionError(f"{connection.server} is no master", BACKEND)


async def find_master(connector: Connector, sentinels: Sequence[Endpoint], service: str) -> Endpoint:
    """The endpoint of a service's master, by the first sentinel that knows. Raises `CacheConnectionError`."""
    reasons: list[str] = []
    for place in sentinels:
        try:
            connection = await connector.connect(place, "sentinel")
            try:
                async with asyncio.timeout(connector.timeout):
                    found = await connection.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
            finally:
                connection.drop(CacheConnectionError("done", BACKEND))
        except (TimeoutError, CacheConnectionError) as error:
            reasons.append(unreachable(error, str(place), connector.timeout).detail)
            continue
        if found:
            host, port = found
            return Endpoint(host.decode(), int(port))
        reasons.append(f"{place} does not know it")
    raise CacheConnectionError(f"no sentinel knows the master of {service!r}: {'; '.join(reasons)}", BACKEND)


class RedisPool:
    """Up to `most` connections to a server, made when they are needed.

    `main`, which may have been lost, carries every request: one that is always busy is the fastest, and it keeps their order.
    The others are for walks over many keys; with `most=1` these share it.
    """

    def __init__(self, connect: Callable[[], Awaitable[RedisConnection]], most: int) -> None:
        self._make_one = connect
        self._most = most
        self.main: RedisConnection | None = None
        self._sides: list[RedisConnection] = []
        self._next = 0
        # One connection is made at a time, so that their number is known.
        self._connecting = asyncio.Lock()
        self._closed = False
        self._failures = 0
        self.trouble: CacheError | None = None
        """Why the last attempt to connect has failed; `None` if it has not."""

    def __repr__(self) -> str:
        return f"<RedisPool of {len(self.connections)}/{self._most} connections>"

    @property
    def connections(self) -> list[RedisConnection]:
        """Those that are up."""
        return [each for each in (self.main, *self._sides) if each is not None and each.lost is None]

    def up(self) -> RedisConnection | None:
        """The connection for requests, if there is one now."""
        main = self.main
        return main if main is not None and main.lost is None else None

    async def connect(self) -> RedisConnection:
        """The connection for requests. Raises `CacheConnectionError` when the server cannot be reached."""
        failures = self._failures
        async with self._connecting:
            connection = self.up()
            if connection is None:
                if failures != self._failures and self.trouble is not None:
                    # An attempt has failed while we waited: ours would take as long and come to the same.
                    raise self.trouble
                connection = self.main = await self._make()
            return connection

    async def ready(self) -> RedisConnection:
        """The connection for requests, once there is room for a batch. Raises as `connect` does."""
        while True:
            connection = self.up() or await self.connect()
            try:
                await connection.room()
            except CacheError:
                continue  # Lost while we waited, and nothing was sent: a new one, or the reason why there is none.
            return connection

    async def side(self) -> RedisConnection:
        """A connection for a walk, one after the other. Raises `CacheConnectionError` when the server cannot be reached."""
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
        """Finish what is in flight, then close. Cancelled, it closes at once."""
        self._closed = True
        try:
            for connection in self.connections:
                await connection.drain()
        finally:
            self.drop()

    def drop(self) -> None:
        """Give up every connection."""
        for connection in self.connections:
            connection.drop(closed())

    async def _make(self) -> RedisConnection:
        if self._closed:
            raise closed()
        try:
            connection = await self._make_one()
        except CacheError as error:
            self._failures += 1
            self.trouble = error
            raise
        self.trouble = None
        if self._closed:
            connection.drop(closed())
        return connection
