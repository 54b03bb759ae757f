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
    loop = asyncio.get_running_loop()
    _, made = await loop.create_connection(AsyncioSocket, host, port, ssl=tls, server_hostname=name if tls else None)
    return made


class AsyncioSocket(asyncio.Protocol):
    """A socket on asyncio, whose transport calls the receiver itself."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._early: list[bytes] = []
        self._ended: list[Exception | None] = []

    @property
    def write(self) -> Callable[[bytes], None]:
        write: Callable[[bytes], None] = self._transport.write
        return write

    @property
    def unsent(self) -> int:
        size: int = self._transport.get_write_buffer_size()
        return size

    def attach(self, receiver: asyncio.Protocol) -> None:
        self._transport.set_protocol(receiver)
        for data in self._early:
            receiver.data_received(data)
        for error in self._ended:
            receiver.connection_lost(error)

    def close(self) -> None:
        self._transport.abort()

    # For the event loop, before there is a receiver

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._early.append(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended.append(exc)


class StreamSocket:
    """A socket on any event loop that anyio knows."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._unsent: deque[bytes] = deque()
        self._sending = False
        self._receiver: asyncio.Protocol | None = None
        self._tasks: set[Callable[[], None]] = set()
        self._over = False

    @property
    def unsent(self) -> int:
        return sum(map(len, self._unsent))

    def attach(self, receiver: asyncio.Protocol) -> None:
        self._receiver = receiver
        self._start(self._receive)

    @property
    def write(self) -> Callable[[bytes], None]:
        return self._write

    def _write(self, data: bytes) -> None:
        self._unsent.append(data)
        if not self._sending:
            self._sending = True
            self._start(self._send)

    def close(self) -> None:
        self._over, self._receiver = True, None
        for cancel in list(self._tasks):
            cancel()
        spawn(self._close(), _nothing)

    def _start(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        # Kept until it has ended, so that closing can cancel it.
        entry: list[Callable[[], None]] = []
        entry.append(spawn(work(), lambda: self._tasks.difference_update(entry)))
        self._tasks.update(entry)

    async def _receive(self) -> None:
        ended: Exception | None = None
        try:
            while True:
                data = await self._stream.receive(READ_BYTES)
                if self._receiver is not None:
                    self._receiver.data_received(data)
        except anyio.EndOfStream:
            pass
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            ended = error
        if self._receiver is not None:
            self._receiver.connection_lost(ended)

    async def _send(self) -> None:
        try:
            while self._unsent and not self._over:
                await self._stream.send(self._unsent[0])
                self._unsent.popleft()
        except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            if self._receiver is not None:
                self._receiver.connection_lost(error)
        finally:
            self._sending = False

    async def _close(self) -> None:
        await anyio.aclose_forcefully(self._stream)


def _nothing() -> None:
    """Closing has no one to report to."""
