"""A TCP proxy that stands between a client and a server and breaks what is between them, as it is told."""

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
"""What a proxy does with connections, those that are open included.

* `pass`: hands everything on.
* `refuse`: nobody listens; open connections are reset.
* `reset`: a connection is reset in the middle of the next reply.
* `half_open`: connections are accepted and stay open, and nothing passes. What was said meanwhile, up to what the
  buffers hold, arrives when the mode changes, as after a network's partition.
* `latency`: every piece of data is on its way for some seconds; any number may be on the way at once.
* `slow`: a megabyte takes some seconds, in each direction.
* `trickle`: data arrive one byte at a time.
* `lose_reply`: the server is asked, and the connection is reset in the place of its reply.
* `garbage`: replies have their bytes replaced by others.
"""

_CHUNK = 65536
_PAUSE = 0.02  # Seconds between two pieces on a slow line.
_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """A proxy in front of `host` and `port`, on a port of its own, run by a thread of its own.

    A context manager. It counts: `connections` accepted, `open_connections` now, `bytes_in` from clients, `bytes_out`
    to clients, each before it is handed on. `switch` changes the mode while it runs and returns once the change holds.
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
        """A proxy in front of a server of `cachebus.testing.servers`, or of anything else with `host` and `port`."""
        return cls(server.host, server.port, mode)

    def __repr__(self) -> str:
        return f"<Proxy on port {self.port} before {self._target[0]}:{self._target[1]}, {self.mode}>"

    def url(self, url: str) -> str:
        """A server's URL with this proxy in the place of the server."""
        parts = urlsplit(url)
        credentials, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{credentials}{at}{self.host}:{self.port}"))

    @property
    def open_connections(self) -> int:
        """How many connections of clients are open."""
        return len(self._pairs)

    def switch(self, mode: Mode, *, seconds: float = 0.0) -> None:
        """Change the mode, for open connections too. `seconds` is the delay of `latency`, and of a megabyte for `slow`."""
        _checked(mode, seconds)
        self._run(self._switch(mode, seconds))

    def cut(self) -> None:
        """Reset every open connection. The mode stays, and new connections are welcome."""
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

    # From here on, everything runs in the proxy's own thread.

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
            # The port stays the same; SO_REUSEADDR, which asyncio sets, takes it again at once.
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
        """Carry data one way until it ends. Reading goes on while what was read before is on its way."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=1024)
        now = asyncio.get_running_loop().time

        async def deliver() -> None:
            while True:
                due, data = await under_way.get()
                if (wait := due - now()) > 0:
                    await asyncio.sleep(wait)
                await self._wait_while_half_open()
                if not data:
                    # The other direction may still have something to say.
                    writer.write_eof()
                    return
                await self._write(writer, data, pair, count, reply=reply)

        delivering = asyncio.ensure_future(deliver())
        try:
            while data := await reader.read(_CHUNK):
                await under_way.put((now() + (self.seconds if self.mode == "latency" else 0.0), data))
                while self.mode == "slow" and under_way.qsize() > 1:  # noqa: ASYNC110 (what it waits for is a size)
                    await asyncio.sleep(0.001)  # A slow line has no room for what the sender is quick to write.
            await under_way.put((0.0, b""))
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
            # A reset throws away what was not read yet, so the client is given a chance to read first.
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
            # Every byte is turned into another one, the ends of lines included.
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
    """The two connections that are one to the client."""

    def __init__(self, near: asyncio.StreamWriter) -> None:
        self.near = near
        self.far: asyncio.StreamWriter | None = None
        self.tasks: list[asyncio.Task[None]] = []

    def reset(self) -> None:
        """End the client's connection with a reset, and the server's with it."""
        for writer in self._writers():
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
        for task in self.tasks:
            task.cancel()

    def close(self) -> None:
        """Give both connections back."""
        for writer in self._writers():
            writer.close()

    def _writers(self) -> list[asyncio.StreamWriter]:
        return [self.near, self.far] if self.far is not None else [self.near]


def _checked(mode: Mode, seconds: float) -> Mode:
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, not {mode!r}")
    if mode == "slow" and not seconds > 0:
        raise ValueError(f"a slow line takes seconds for a megabyte, more than 0, not {seconds!r}")
    return mode
