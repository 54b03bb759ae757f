"""Sockets on an event loop whose bytes go to a callback: asyncio's own transports on asyncio, anyio's streams elsewhere."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import anyio
from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream

from cachebus.actors.ports import running_loop, spawn

READ_BYTES = 1 << 18


class AsyncSocket(Protocol):
    """A connected socket. Bytes are sent in the order in which they are written, without waiting.

    What comes goes to a receiver, to its `data_received` and `connection_lost`, as asyncio has it.
    """

    @property
    def write(self) -> Callable[[bytes], None]: ...

    @property
    def unsent(self) -> int:
        """Bytes that were written and that the operating system has not taken yet."""
        ...

    def attach(self, receiver: asyncio.Protocol) -> None:
        """Name the receiver, before anything is written."""

    def close(self) -> None:
        """Close at once. The receiver hears nothing more that counts."""


async def open_socket(host: str, port: int, tls: ssl.SSLContext | None, name: str) -> AsyncSocket:
    """Connect to a numeric address; with `tls`, to the server of that name. Raises `OSError`."""
    if running_loop() is None:
        stream: ByteStream = await anyio.connect_tcp(host, port)
        if tls is not None:
            try:
                stream = await TLSStream.wrap(stream, hostname=name, ssl_context=tls, standard_compatible=False)
            except BaseException:
                await anyio.aclose_forcefully(stream)
                raise
        return StreamSocket(stream)
    loop, wanted = asyncio.get_running_loop(), name if tls else None
    transport, _ = await loop.create_connection(_Unattached, host, port, ssl=tls, server_hostname=wanted)
    return AsyncioSocket(transport)


class _Unattached(asyncio.Protocol):
    """A protocol that leaves what comes to the operating system, until there is a receiver."""

    def connection_made(self, transport: Any) -> None:
        transport.pause_reading()


class AsyncioSocket:
    """A socket on asyncio, whose transport calls the receiver itself."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.write: Callable[[bytes], None] = transport.write

    @property
    def unsent(self) -> int:
        return self._transport.get_write_buffer_size()

    def attach(self, receiver: asyncio.Protocol) -> None:
        self._transport.set_protocol(receiver)
        self._transport.resume_reading()

    def close(self) -> None:
        self._transport.abort()


class StreamSocket:
    """A socket on any event loop that anyio knows."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._unsent: deque[bytes] = deque()
        self._sending = False
        self._receiver: asyncio.Protocol | None = None
        self._cancel_receiving = self._cancel_sending = _nothing

    @property
    def unsent(self) -> int:
        return sum(map(len, self._unsent))

    def attach(self, receiver: asyncio.Protocol) -> None:
        self._receiver = receiver
        self._cancel_receiving = spawn(self._guarded(self._receive()))

    def write(self, data: bytes) -> None:
        self._unsent.append(data)
        if not self._sending:
            self._sending = True
            self._cancel_sending = spawn(self._guarded(self._send()))

    def close(self) -> None:
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
                if self._unsent:  # Closing has taken them away.
                    self._unsent.popleft()
        finally:
            self._sending = False


def _nothing() -> None:
    """Cancel nothing."""
