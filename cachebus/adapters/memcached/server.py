"""One Memcached server and its connection. Exchanges run one at a time, in the order of their arrival."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import anyio
from anyio import to_thread
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream

from cachebus.actors.ports import Clock, running_loop, running_timers, spawn
from cachebus.messages import CacheClosed, CacheConfigurationError, CacheConnectionError, CacheError

from .connection import Connection
from .errors import BACKEND, unreachable

READ_BYTES = 1 << 18

BETWEEN_ATTEMPTS = 0.05
"""Minimum number of seconds between two background attempts to connect."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The host and port of a server."""

    host: str
    port: int = 11211

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connector:
    """Opens connections. `connect_timeout` limits connecting as a whole and `timeout` one exchange, in seconds.

    Host names are resolved in a thread, which cannot be cancelled. At most `most` such threads may run per server.
    """

    clock: Clock
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    connect_timeout: float = 1.0
    timeout: float = 1.0
    most: int = 2

    async def connect(self, endpoint: Endpoint, lookups: set[object]) -> Connection:
        """Return a connection that is ready for use. `lookups` holds the running threads that resolve the host name.

        Raises `CacheConnectionError`, or `CacheConfigurationError` for an error that another attempt will not fix.
        """
        try:
            with anyio.fail_after(self.connect_timeout):
                failure: OSError = OSError(f"no address for {endpoint.host}")
                for address in await self._addresses(endpoint, lookups):
                    try:
                        transport = await open_transport(address, endpoint.port, self.tls, endpoint.host)
                    except ssl.SSLError:
                        raise
                    except OSError as error:
                        failure = error
                    else:
                        return await self._handshake(endpoint, transport)
                raise failure
        except (OSError, ValueError) as error:
            raise unreachable(error, str(endpoint), self.connect_timeout) from None

    async def _handshake(self, endpoint: Endpoint, transport: asyncio.Transport) -> Connection:
        timers = running_timers(self.clock)
        connection = Connection(str(endpoint), transport, self.clock, timers, max(self.connect_timeout, self.timeout))
        finished = Result()
        try:
            connection.begin(connection.handshake(), finished)
            refusal = await finished.wait()
            if isinstance(refusal, CacheConnectionError | CacheConfigurationError):
                raise refusal
            if isinstance(refusal, CacheError):
                raise unreachable(ValueError(), str(endpoint), 0.0)
        except BaseException:
            connection.close()
            raise
        connection.timeout = self.timeout
        return connection

    async def _addresses(self, endpoint: Endpoint, lookups: set[object]) -> list[str]:
        try:
            return [str(ip_address(endpoint.host))]
        except ValueError:
            pass
        if len(lookups) >= self.most:
            raise CacheConnectionError(f"{self.most} threads are already resolving the host of {endpoint}", BACKEND)
        lookup = object()
        lookups.add(lookup)

        def look_up() -> list[str]:
            try:
                found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
                return [str(address[0]) for *_, address in found]
            finally:
                lookups.discard(lookup)

        # A separate limiter, so that a slow name server does not use up the application's threads.
        return await to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=anyio.CapacityLimiter(1))


class StreamTransport(asyncio.Transport):
    """A transport over an anyio stream, for event loops other than asyncio."""

    def __init__(self, stream: ByteStream) -> None:
        super().__init__()
        self._stream = stream
        self._unsent: deque[bytes] = deque()
        self._sending = False
        self._receiver: Any = None
        self._cancel_receiving: Callable[[], None] = lambda: None
        self._cancel_sending: Callable[[], None] = lambda: None

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._receiver = protocol

    def resume_reading(self) -> None:
        self._cancel_receiving = spawn(self._guarded(self._receive()))

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self._unsent))

    def write(self, data: Any) -> None:
        self._unsent.append(data)
        if not self._sending:
            self._sending = True
            self._cancel_sending = spawn(self._guarded(self._send()))

    def abort(self) -> None:
        self._receiver = None
        self._unsent.clear()
        self._cancel_receiving()
        self._cancel_sending()
        spawn(anyio.aclose_forcefully(self._stream))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        ended: Exception | None = None
        try:
            await work
            return
        except anyio.EndOfStream:
            pass
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            ended = error
        if self._receiver is not None:
            self._receiver.connection_lost(ended)

    async def _receive(self) -> None:
        while (receiver := self._receiver) is not None:
            data = await self._stream.receive(READ_BYTES)
            if self._receiver is receiver:
                receiver.data_received(data)

    async def _send(self) -> None:
        try:
            while self._unsent:
                await self._stream.send(self._unsent[0])
                if self._unsent:  # `abort` clears it.
                    self._unsent.popleft()
        finally:
            self._sending = False


async def open_transport(host: str, port: int, tls: ssl.SSLContext | None, name: str) -> asyncio.Transport:
    """Connect to a numeric address. With `tls`, the certificate must match `name`. Raises `OSError`.

    Incoming bytes stay in the operating system until the transport has a protocol and is resumed.
    """
    if running_loop() is None:
        stream: ByteStream = await anyio.connect_tcp(host, port)
        if tls is not None:
            try:
                stream = await TLSStream.wrap(stream, hostname=name, ssl_context=tls, standard_compatible=False)
            except BaseException:
                await anyio.aclose_forcefully(stream)
                raise
        return StreamTransport(stream)
    loop, wanted = asyncio.get_running_loop(), name if tls else None
    transport, _ = await loop.create_connection(_Paused, host, port, ssl=tls, server_hostname=wanted)
    return transport


class _Paused(asyncio.Protocol):
    """The initial protocol of a transport, which pauses reading."""

    def connection_made(self, transport: Any) -> None:
        transport.pause_reading()


class Result:
    """A callback whose argument a task can wait for."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._result: Any = None

    def __call__(self, result: Any) -> None:
        self._result = result
        self._event.set()

    async def wait(self) -> Any:
        await self._event.wait()
        return self._result


class Server:
    """A server and the turn at its connection. A caller takes the turn for one exchange, whose end returns it.

    With `in_background`, a lost server is reconnected in a background task, and callers fail immediately until it is
    connected. So it does not delay requests for the keys of other servers.
    """

    def __init__(self, endpoint: Endpoint, connector: Connector, *, in_background: bool) -> None:
        self.endpoint = endpoint
        self.connection: Connection | None = None
        self._connector = connector
        self._in_background = in_background
        self._turn = anyio.Semaphore(1, fast_acquire=True)
        self._closed = False
        self._unavailable = False
        self._lookups: set[object] = set()
        self._attempting = False
        self._cancel_attempt: Callable[[], None] | None = None
        self._failure: CacheError | None = None
        self._failed_at = float("-inf")

    def __repr__(self) -> str:
        state = "idle" if self._turn.value else "busy"
        return f"<Server at {self.endpoint}, {state}, {len(self._lookups)}/{self._connector.most} lookups>"

    def try_acquire(self) -> Connection | None:
        """Take the turn and return the connection, or return `None` if that would have to wait."""
        connection = self.connection
        if connection is None or connection.lost is not None or not self._turn.value:
            return None
        self._turn.acquire_nowait()
        return connection

    async def acquire(self) -> Connection:
        """Wait for the turn and return the connection. Raises `CacheConnectionError` if it cannot be opened."""
        await self._turn.acquire()
        try:
            if self._closed:
                raise CacheClosed("the connection to memcached was closed")
            if self.connection is None or self.connection.lost is not None:
                if self._unavailable:
                    self._reconnect_in_background()
                else:
                    await self._connect()
            assert self.connection is not None
            return self.connection
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Return the turn. The caller that has waited longest gets it."""
        if self.connection is not None and self.connection.lost is not None:
            self._unavailable = self._in_background
        self._turn.release()

    async def connect(self) -> None:
        """Open the connection if it is not open. Raises `CacheError`."""
        await self.acquire()
        self.release()

    async def close(self) -> None:
        """Finish the exchange in flight, then close. If cancelled, close immediately."""
        try:
            await self._turn.acquire()
            self.release()
        finally:
            self.abort()

    def abort(self) -> None:
        """Close immediately. Requests in flight fail."""
        self._closed = True
        if self._attempting and self._cancel_attempt is not None:
            self._cancel_attempt()
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    async def _connect(self) -> None:
        try:
            connection = await self._connector.connect(self.endpoint, self._lookups)
        except CacheError:
            self._unavailable = self._in_background
            raise
        if self._closed:
            connection.close()
            raise CacheClosed("the connection to memcached was closed")
        connection.on_idle = self.release
        self.connection, self._unavailable, self._failure = connection, False, None

    def _reconnect_in_background(self) -> None:
        """Start a background attempt to connect if none is running, and raise the last connection error."""
        now = self._connector.clock.monotonic()
        if not self._attempting and now > self._failed_at + BETWEEN_ATTEMPTS:
            self._attempting = True  # Set first, because the attempt may end immediately.
            self._cancel_attempt = spawn(self._attempt(), self._attempted)
        raise self._failure or CacheConnectionError(f"{self.endpoint} is disconnected; reconnecting", BACKEND)

    def _attempted(self) -> None:
        self._attempting = False

    async def _attempt(self) -> None:
        try:
            await self._connect()
        except CacheError as error:
            self._failure, self._failed_at = error, self._connector.clock.monotonic()
