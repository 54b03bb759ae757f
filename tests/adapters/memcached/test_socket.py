"""Sockets with tiny buffers, so that sending and receiving block each other all the time."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager

import anyio
import pytest

from cachebus.adapters.memcached.server import StreamTransport, open_transport
from cachebus.messages import Found, FoundMany, Get, GetMany, Set, SetMany, Stored, StoredMany
from cachebus.testing.proxy import Proxy
from cachebus.testing.servers import run_memcached

from .conftest import one, opened, sync

TINY = 2048  # Bytes; the kernel doubles it.
LIMIT = 60.0


def _small(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, TINY)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TINY)


@contextmanager
def echo(seed: int) -> Generator[int]:
    """Run an echo server with tiny buffers that splits its data into pieces of random size."""
    listener = socket.create_server(("127.0.0.1", 0))
    _small(listener)
    chance = random.Random(seed)

    def answer() -> None:
        theirs, _ = listener.accept()
        with theirs:
            while data := theirs.recv(chance.choice((1, 100, 5000))):
                while data:
                    size = chance.choice((1, 7, 1000, 10_000))
                    theirs.sendall(data[:size])
                    data = data[size:]

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
        thread.join(LIMIT)


class Heard(asyncio.Protocol):
    """Protocol that collects the data and the end of a connection."""

    def __init__(self) -> None:
        self.data = b""
        self.size = 0
        self.ended: list[Exception | None] = []
        self.change = anyio.Event()

    def data_received(self, data: bytes) -> None:
        self.data += data
        if len(self.data) >= self.size:
            self.change.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.append(exc)
        self.change.set()


async def test_what_is_said_comes_back_whatever_waits_for_what() -> None:
    chance = random.Random(1)
    with echo(2) as port:
        made = await open_transport("127.0.0.1", port, None, "")
        heard = Heard()
        made.set_protocol(heard)
        made.resume_reading()
        with anyio.fail_after(LIMIT):
            for number in range(500):
                said = chance.randbytes(chance.choice((1, 50, TINY, TINY + 1, 5 * TINY)))
                heard.data, heard.size, heard.change = b"", len(said), anyio.Event()
                made.write(said)
                await heard.change.wait()
                assert heard.data == said, number
        made.abort()


async def test_a_socket_that_is_closed_by_the_other_end_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = await open_transport("127.0.0.1", listener.getsockname()[1], None, "")
        heard = Heard()
        heard.size = 1
        made.set_protocol(heard)
        made.resume_reading()
        theirs, _ = await sync(listener.accept)
        theirs.close()
        with anyio.fail_after(30):
            await heard.change.wait()
        assert heard.data == b""
        made.abort()


async def test_the_socket_is_that_of_the_event_loop(anyio_backend_name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        made = await open_transport("127.0.0.1", listener.getsockname()[1], None, "")
        made.set_protocol(Heard())
        made.resume_reading()
        assert isinstance(made, StreamTransport) == (anyio_backend_name == "trio")
        made.abort()


async def test_large_batches_pass_through_small_buffers_both_ways() -> None:
    with run_memcached() as server, Proxy.before(server) as proxy:
        async with opened(proxy, timeout=20.0) as store:
            first = {f"a{number}": b"a" * 1_000_000 for number in range(3)}
            second = {f"b{number}": b"b" * 1_000_000 for number in range(3)}
            assert isinstance(await one(store, SetMany(first)), StoredMany)
            with anyio.fail_after(LIMIT):
                # Receives 3 MB while it sends 3 MB.
                found, stored = await store.execute([GetMany(tuple(first)), SetMany(second)])
            assert isinstance(found, FoundMany)
            assert {key: each.value for key, each in found.entries.items()} == first
            assert stored == StoredMany(3)
            assert proxy.connections == 1  # The connection was not lost.


@pytest.mark.parametrize("came", [b"", b"HD\r\n"])
async def test_a_connection_that_was_closed_or_spoke_up_between_two_exchanges_costs_no_request(came: bytes) -> None:
    with run_memcached() as server:
        async with opened(server) as store:
            assert isinstance(await one(store, Set("k", 1)), Stored)
            (kept,) = store._servers.values()
            connection = kept.connection
            assert connection is not None
            if came:
                # Bypass the exchange, so that the server sends an unexpected reply.
                connection._write(b"ms x 1\r\n1\r\n")
            else:
                await sync(server.restart)
            with anyio.fail_after(30):
                while connection.lost is None:
                    await anyio.sleep(0.001)
            assert isinstance(await one(store, Set("k", 2)), Stored)
            found = await one(store, Get("k"))
            assert isinstance(found, Found)
            assert found.value == 2
