"""A line with hardly any room in it: what is sent and what comes wait for each other all the time, and nobody is forgotten."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager

import anyio
import pytest

from cachebus.adapters.memcached_line import AnyLine, AsyncioLine, Line, line_for
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
def echo(seed: int) -> Generator[socket.socket]:
    """A socket whose other end says back what it hears, in pieces of any size."""
    ours, theirs = socket.socketpair()
    for each in (ours, theirs):
        _small(each)
    ours.setblocking(False)
    chance = random.Random(seed)

    def answer() -> None:
        with theirs:
            while data := theirs.recv(chance.choice((1, 100, 5000))):
                while data:
                    size = chance.choice((1, 7, 1000, 10_000))
                    theirs.sendall(data[:size])
                    data = data[size:]

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(LIMIT)


async def test_what_is_said_comes_back_whatever_waits_for_what() -> None:
    chance = random.Random(1)
    with echo(2) as sock:
        line: Line = line_for(sock)
        with anyio.fail_after(LIMIT):
            for number in range(1500):
                said = chance.randbytes(chance.choice((1, 50, TINY, TINY + 1, 5 * TINY)))
                line.allow(20.0)
                await line.send(said)
                heard = b""
                while len(heard) < len(said):
                    heard += await line.receive()
                assert heard == said, number
        line.close()


async def test_a_line_that_is_stopped_up_ends_at_its_deadline_and_one_that_is_closed_at_once() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        _small(ours)
        ours.setblocking(False)
        line = line_for(ours)
        line.allow(0.1)
        with anyio.fail_after(30), pytest.raises(TimeoutError):
            await line.send(b"x" * 10_000_000)
        line.allow(0.1)
        with anyio.fail_after(30), pytest.raises(TimeoutError):
            await line.receive()
        theirs.close()
        line.allow(20.0)
        with anyio.fail_after(30), pytest.raises((EOFError, ConnectionError)):
            await line.receive()
        line.close()


async def test_the_line_is_that_of_the_event_loop(anyio_backend_name: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        line = line_for(ours)
        assert type(line) is (AsyncioLine if anyio_backend_name == "asyncio" else AnyLine)
        line.close()


async def test_large_batches_pass_through_small_buffers_both_ways() -> None:
    with run_memcached() as server, Proxy.before(server) as proxy:
        async with opened(proxy, timeout=20.0) as store:
            (lane,) = store._servers.values()
            assert lane.connection is not None
            # Not the room for what comes: TCP grows slow when it has to say so often that there is some again.
            lane.connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * TINY)
            first = {f"a{number}": b"a" * 1_000_000 for number in range(3)}
            second = {f"b{number}": b"b" * 1_000_000 for number in range(3)}
            assert isinstance(await one(store, SetMany(first)), StoredMany)
            with anyio.fail_after(LIMIT):
                # 3 MB on their way here while as much is on its way there.
                found, stored = await store.execute([GetMany(tuple(first)), SetMany(second)])
            assert isinstance(found, FoundMany)
            assert {key: each.value for key, each in found.entries.items()} == first
            assert stored == StoredMany(3)
            assert proxy.connections == 1  # Nothing was lost on the way.


@pytest.mark.parametrize("came", [b"", b"HD\r\n"])
async def test_a_connection_that_was_closed_or_spoke_up_between_two_talks_costs_no_request(came: bytes) -> None:
    with run_memcached() as server:
        async with opened(server) as store:
            assert isinstance(await one(store, Set("k", 1)), Stored)
            (lane,) = store._servers.values()
            assert lane.connection is not None
            if came:
                # What somebody in between may do; here it is the server that is asked behind the back of the line.
                await sync(os.write, lane.connection._sock.fileno(), b"ms x 1\r\n1\r\n")
            else:
                await sync(server.restart)
            line = lane.connection._line
            assert line is not None
            with anyio.fail_after(30):
                while line.fit:
                    await anyio.sleep(0.001)
            assert isinstance(await one(store, Set("k", 2)), Stored)
            found = await one(store, Get("k"))
            assert isinstance(found, Found)
            assert found.value == 2
