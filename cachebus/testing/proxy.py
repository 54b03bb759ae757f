"""A TCP proxy that injects network faults between a client and a server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Self, get_args
from urllib.parse import urlsplit, urlunsplit

Mode = Literal["pass", "refuse", "reset", "half_open", "latency", "slow", "trickle", "lose_reply", "garbage"]
"""Treatment of new and open connections.

* `pass`: forwards all data.
* `refuse`: refuses new connections and resets open ones.
* `reset`: resets a connection in the middle of the next reply.
* `half_open`: accepts connections and keeps them open, but forwards nothing. The data buffered meanwhile arrive when
  the mode changes, as after a network partition.
* `latency`: delays all data by some seconds, without limiting the throughput.
* `slow`: limits the throughput to a megabyte in some seconds, in each direction.
* `trickle`: forwards one byte at a time.
* `lose_reply`: forwards the request, and resets the connection instead of forwarding the reply.
* `garbage`: replaces the bytes of replies.
"""

_CHUNK = 65536
_PAUSE = 0.02  # Seconds between two chunks in the mode `slow`.
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """A proxy in front of `host` and `port`, run by a separate thread. Use it as a context manager.

    It counts accepted `connections`, current `open_connections`, `bytes_in` from clients and `bytes_out` to clients.
    Bytes are counted before they are forwarded. `switch` changes the mode and returns when the change has taken effect.
    """

    host = "127.0.0.1"

    def __init__(self, host: str, port: int, mode: Mode = "pass", *, seconds: float = 0.0) -> None:
        self.connections = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.port = 0
        self.mode: Mode = _checked(mode, seconds)
        self.seconds = seconds
        self._target = (host, port)
        self._pairs: set[_Pair] = set()
        self._listener: asyncio.Server | None = None
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = asyncio.Event()

    @classmethod
    def before(cls, server: Any, mode: Mode = "pass") -> Proxy:
        """Return a proxy in front of a server of `cachebus.testing.servers`, or any object with `host` and `port`."""
        return cls(server.host, server.port, mode)

    def __repr__(self) -> str:
        return f"<Proxy on port {self.port} before {self._target[0]}:{self._target[1]}, {self.mode}>"

    def url(self, url: str) -> str:
        """Return the URL of a server with the address of the proxy instead."""
        parts = urlsplit(url)
        credentials, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{credentials}{at}{self.host}:{self.port}"))

    @property
    def open_connections(self) -> int:
        """Number of open client connections."""
        return len(self._pairs)

    def switch(self, mode: Mode, *, seconds: float = 0.0) -> None:
        """Change the mode, also for open connections.

        `seconds` is the delay for `latency`, and the time for a megabyte for `slow`.
        """
        _checked(mode, seconds)
        self._run(self._switch(mode, seconds))

    def cut(self) -> None:
        """Reset all open connections. The mode does not change, and new connections are accepted."""
        self._run(self._cut())

    def __enter__(self) -> Self:
        ready = threading.Event()

        def run() -> None:
            with asyncio.Runner() as runner:
                self._loop = runner.get_loop()

                async def live() -> None:
                    await self._listen()
                    ready.set()
                    await self._stopped.wait()
                    await self._silence()
                    await self._cut()

                runner.run(live())

        self._thread = threading.Thread(target=run, name="cachebus-proxy", daemon=True)
        self._thread.start()
        if not ready.wait(10):
            raise RuntimeError("the proxy could not listen")
        return self

    def __exit__(self, *error: object) -> None:
        assert self._loop is not None
        assert self._thread is not None
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._loop is not None, "the proxy is not entered"
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # The following methods run in the proxy's thread.

    async def _switch(self, mode: Mode, seconds: float) -> None:
        self.mode, self.seconds = mode, seconds
        if mode == "refuse":
            await self._silence()
            await self._cut()
        else:
            await self._listen()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _listen(self) -> None:
        if self._listener is None and self.mode != "refuse":
            # The port stays the same. asyncio sets SO_REUSEADDR, so it can be bound again at once.
            self._listener = await asyncio.start_server(self._accept, self.host, self.port, backlog=2048)
            self.port = self._listener.sockets[0].getsockname()[1]

    async def _silence(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    async def _cut(self) -> None:
        for pair in list(self._pairs):
            pair.reset()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        pair = _Pair(writer)
        self._pairs.add(pair)
        try:
            await self._wait_while_half_open()
            far_reader, pair.far = await asyncio.open_connection(*self._target)
            for each in (pair.near, pair.far):
                each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.TaskGroup() as directions:
                pair.tasks = [
                    directions.create_task(self._carry(reader, pair.far, pair, self._count_in, reply=False)),
                    directions.create_task(self._carry(far_reader, pair.near, pair, self._count_out, reply=True)),
                ]
        except* (OSError, asyncio.CancelledError):
            pair.reset()
        finally:
            self._pairs.discard(pair)
            pair.close()

    async def _carry(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: _Pair,
        count: Callable[[int], None],
        *,
        reply: bool,
    ) -> None:
        """Forward data in one direction until it ends. Reading continues while earlier data are delayed."""
        in_transit: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=1024)
        now = asyncio.get_running_loop().time

        async def deliver() -> None:
            while True:
                due, data = await in_transit.get()
                if (wait := due - now()) > 0:
                    await asyncio.sleep(wait)
                await self._wait_while_half_open()
                if not data:
                    # The other direction may still send data.
                    writer.write_eof()
                    return
                await self._write(writer, data, pair, count, reply=reply)

        delivering = asyncio.ensure_future(deliver())
        try:
            while data := await reader.read(_CHUNK):
                await in_transit.put((now() + (self.seconds if self.mode == "latency" else 0.0), data))
                # Backpressure: a slow connection does not buffer the data of a fast sender.
                while self.mode == "slow" and in_transit.qsize() > 1:  # noqa: ASYNC110 (There is no event for a size.)
                    await asyncio.sleep(0.001)
            await in_transit.put((0.0, b""))
            await delivering
        finally:
            delivering.cancel()

    async def _write(
        self, writer: asyncio.StreamWriter, data: bytes, pair: _Pair, count: Callable[[int], None], *, reply: bool
    ) -> None:
        mode = self.mode
        if reply and mode == "lose_reply":
            pair.reset()
        elif reply and mode == "reset":
            half = data[: max(1, len(data) // 2)]
            count(len(half))
            writer.write(half)
            # A reset discards unread data, so let the client read first.
            await asyncio.sleep(0.01)
            pair.reset()
        elif mode == "slow":
            size = max(1, int(_PAUSE * 1e6 / self.seconds))
            for start in range(0, len(data), size):
                piece = data[start : start + size]
                await asyncio.sleep(len(piece) / 1e6 * self.seconds)
                count(len(piece))
                writer.write(piece)
                await writer.drain()
        elif mode == "trickle":
            for place in range(len(data)):
                count(1)
                writer.write(data[place : place + 1])
                await writer.drain()
                await asyncio.sleep(0)
        else:
            # This changes every byte, including line ends.
            data = bytes(each ^ 0x55 for each in data) if reply and mode == "garbage" else data
            count(len(data))
            writer.write(data)
            await writer.drain()

    async def _wait_while_half_open(self) -> None:
        while self.mode == "half_open":
            await self._changed.wait()

    def _count_in(self, size: int) -> None:
        self.bytes_in += size

    def _count_out(self, size: int) -> None:
        self.bytes_out += size


class _Pair:
    """The client's connection to the proxy and the proxy's connection to the server."""

    def __init__(self, near: asyncio.StreamWriter) -> None:
        self.near = near
        self.far: asyncio.StreamWriter | None = None
        self.tasks: list[asyncio.Task[None]] = []

    def reset(self) -> None:
        """Reset both connections."""
        for writer in self._writers():
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        for task in self.tasks:
            task.cancel()

    def close(self) -> None:
        """Close both connections."""
        for writer in self._writers():
            writer.close()

    def _writers(self) -> list[asyncio.StreamWriter]:
        return [self.near, self.far] if self.far is not None else [self.near]


def _checked(mode: Mode, seconds: float) -> Mode:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
    if mode == "slow" and not seconds > 0:
        raise ValueError(f"seconds must be above 0 for the mode slow, not {seconds!r}")
    return mode
