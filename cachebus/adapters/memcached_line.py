"""A connected socket on an event loop, with one deadline for all that is sent and received: asyncio's own way where that
runs, because it takes a third of the time, and anyio's elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from asyncio import _get_running_loop
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import anyio

READ_BYTES = 1 << 16
SLOWEST_LINE = 10e6
"""Bytes a second below which a server counts as not answering."""

_NOT_YET = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
_Wait = Callable[[socket.socket], Awaitable[None]]


class Line(Protocol):
    """What a connection talks over. What goes wrong is an `OSError`, `TimeoutError` past the deadline, or `EOFError`."""

    @property
    def fit(self) -> bool:
        """Whether a question may be asked: the other end is there, and nothing has come that answers none."""
        ...

    def allow(self, seconds: float) -> None:
        """Let what follows take so long."""

    async def send(self, data: bytes) -> None: ...

    async def receive(self) -> bytes:
        """What has come, at least one byte. Every byte that comes moves the deadline by what a slow line takes for it."""
        ...

    def close(self) -> None:
        """Let go of the socket, which stays open."""


def line_for(sock: socket.socket) -> Line:
    """A line over a connected socket that does not block."""
    if _get_running_loop() is not None:
        with contextlib.suppress(NotImplementedError):  # Windows has a loop that watches no sockets.
            return AsyncioLine(sock)
    return AnyLine(sock)


class AnyLine:
    """A line on any event loop that anyio knows."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._come: deque[bytes] = deque()
        self._hears: _Wait = anyio.wait_readable
        self._deadline = 0.0

    @property
    def fit(self) -> bool:
        try:
            return not self._come and not self._read()
        except (OSError, EOFError):
            return False

    def allow(self, seconds: float) -> None:
        self._deadline = anyio.current_time() + seconds

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                sent = self._sock.send(rest)
            except ssl.SSLWantReadError:
                await self._wait(anyio.wait_readable)
            except _NOT_YET:
                # A server whose answers nobody reads reads no more commands, and both would wait for ever.
                if not self._read():
                    await self._wait(anyio.wait_readable, anyio.wait_writable)
            else:
                rest = rest[sent:]
                self._deadline += sent / SLOWEST_LINE

    async def receive(self) -> bytes:
        while not self._come and not self._read():
            await self._wait(self._hears)
        data = self._come.popleft()
        self._deadline += len(data) / SLOWEST_LINE
        return data

    def close(self) -> None:
        pass

    def _read(self) -> bool:
        """Take in what has come; whether anything has."""
        try:
            data = self._sock.recv(READ_BYTES)
        except _NOT_YET as error:
            self._hears = anyio.wait_writable if isinstance(error, ssl.SSLWantWriteError) else anyio.wait_readable
            return False
        if not data:
            raise EOFError
        self._come.append(data)
        return True

    async def _wait(self, *things: _Wait) -> None:
        """Return when one of these things has happened. Raises `TimeoutError` at the deadline."""
        with anyio.fail_after(max(self._deadline - anyio.current_time(), 0)):
            if len(things) == 1:
                await things[0](self._sock)
                return
            async with anyio.create_task_group() as tasks:

                async def wait(thing: _Wait) -> None:
                    await thing(self._sock)
                    tasks.cancel_scope.cancel()

                for thing in things:
                    tasks.start_soon(wait, thing)


class AsyncioLine:
    """A line on asyncio. The loop watches the socket all the time, and what comes is read at once."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._come: deque[bytes] = deque()
        self._end: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._alarm: asyncio.TimerHandle | None = None
        self._descriptor = sock.fileno()
        self._loop.add_reader(self._descriptor, self._readable)

    @property
    def fit(self) -> bool:
        return self._end is None and not self._come

    def allow(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds

    async def send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                sent = self._sock.send(rest)
            except ssl.SSLWantReadError:
                await self._wait()
            except _NOT_YET:
                self._loop.add_writer(self._descriptor, self._wake)
                try:
                    await self._wait()
                finally:
                    self._loop.remove_writer(self._descriptor)
            else:
                rest = rest[sent:]
                self._deadline += sent / SLOWEST_LINE

    async def receive(self) -> bytes:
        while not self._come:
            if self._end is not None:
                raise self._end
            await self._wait()
        data = self._come.popleft()
        self._deadline += len(data) / SLOWEST_LINE
        return data

    def close(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)

    async def _wait(self) -> None:
        """Return when something has happened. Raises `TimeoutError` at the deadline."""
        if self._loop.time() >= self._deadline:
            raise TimeoutError
        self._waiter = waiter = self._loop.create_future()
        # One alarm for many waits: mostly it rings when everything has long been answered, and is set anew then.
        if self._alarm is None:
            self._alarm = self._loop.call_at(self._deadline, self._ring)
        elif self._alarm.when() > self._deadline:
            self._alarm.cancel()
            self._alarm = self._loop.call_at(self._deadline, self._ring)
        try:
            await waiter
        finally:
            self._waiter = None

    def _ring(self) -> None:
        self._alarm = None
        if self._waiter is None or self._waiter.done():
            return
        if self._loop.time() < self._deadline:
            self._alarm = self._loop.call_at(self._deadline, self._ring)
        else:
            self._waiter.set_exception(TimeoutError())

    def _readable(self) -> None:
        try:
            while True:
                data = self._sock.recv(READ_BYTES)
                if not data:
                    raise EOFError
                self._come.append(data)
                # A TLS socket may hold more than the loop sees.
                if len(data) < READ_BYTES and not isinstance(self._sock, ssl.SSLSocket):
                    break
        except _NOT_YET:
            pass
        except (OSError, EOFError) as error:
            self._end = error
            self._loop.remove_reader(self._descriptor)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
