"""Making connections to Redis servers: where they are, who we are to them, and the greeting."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import hiredis

from cachebus.actors.ports import Clock
from cachebus.messages import CacheConfigurationError, CacheConnectionError, CacheError

from .redis_connection import RedisConnection, pack
from .redis_errors import BACKEND, translate_greeting, unreachable
from .redis_scripts import scripts
from .tls import TlsFiles

__all__ = ["Connector", "Credentials", "Endpoint", "TlsFiles", "find_master"]

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
    """Who connects: a user of the server's, `default` if only a password is given."""

    user: str = ""
    password: str | None = field(default=None, repr=False)

    def hello(self) -> bytes:
        """The command that begins RESP3, as this user."""
        if self.password is None:
            return pack("HELLO", 3)
        return pack("HELLO", 3, "AUTH", self.user or "default", self.password)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connector:
    """How connections are made. `timeout` is in seconds and holds for all of connecting; `health_interval` as in
    `RedisConnection`."""

    clock: Clock
    identity: Credentials = Credentials()
    database: int = 0
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    timeout: float = 1.0
    health_interval: float | None = 2.0
    window: int = 8
    counters_here: bool = True
    """Whether the scripts get at the counters of tags, which in a cluster are in another slot."""

    async def prepared(self, tls: TlsFiles | None) -> Connector:
        """The same, with the certificates read. Raises `CacheConfigurationError` under another event loop than asyncio's."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise CacheConfigurationError("redis needs an asyncio event loop, and this is another's") from None
        return self if tls is None else replace(self, tls=await asyncio.to_thread(tls.context, BACKEND))

    async def connect(self, place: Endpoint, role: Role = "any") -> RedisConnection:
        """A connection that is ready. As a `master`, a server that is none is refused.

        Raises `CacheConnectionError`, or `CacheConfigurationError` for what another attempt will not mend.
        """
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

    async def ask(self, place: Endpoint, *arguments: str) -> Any:
        """The reply of a sentinel to one command, over a connection of its own."""
        connection = await self.connect(place, "sentinel")
        try:
            async with asyncio.timeout(self.timeout):
                return await connection.call(*arguments)
        except TimeoutError as error:
            raise unreachable(error, str(place), self.timeout) from None
        finally:
            connection.drop(CacheConnectionError("done", BACKEND))

    async def _open(self, place: Endpoint) -> RedisConnection:
        loop = asyncio.get_running_loop()

        def protocol() -> RedisConnection:
            return RedisConnection(str(place), self.clock, window=self.window, health_interval=self.health_interval)

        if place.path:
            _, connection = await loop.create_unix_connection(protocol, place.path)
        else:
            _, connection = await loop.create_connection(
                protocol, place.host, place.port, ssl=self.tls, server_hostname=place.host if self.tls else None
            )
        return connection

    async def _handshake(self, connection: RedisConnection, role: Role) -> None:
        commands = [self.identity.hello()]
        if role != "sentinel":
            commands.append(pack("TIME"))
        if role == "master":
            commands.append(pack("ROLE"))
        if self.database:
            commands.append(pack("SELECT", self.database))
        needed = len(commands)
        # A user who may not load scripts may still send them whole: what comes of these is not asked.
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


async def find_master(dial: Connector, sentinels: Sequence[Endpoint], service: str) -> Endpoint:
    """Where the master of a service is, by the first sentinel that knows. Raises `CacheConnectionError`."""
    reasons: list[str] = []
    for place in sentinels:
        try:
            found = await dial.ask(place, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        except CacheConnectionError as error:
            reasons.append(error.detail)
            continue
        if found:
            host, port = found
            return Endpoint(host.decode(), int(port))
        reasons.append(f"{place} does not know it")
    raise CacheConnectionError(f"no sentinel knows the master of {service!r}: {'; '.join(reasons)}", BACKEND)
