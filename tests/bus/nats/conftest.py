"""Fixtures: a real server, buses on it, and actors in other processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import anyio.to_thread
import pytest

from cachebus.bus.nats.bus import NatsBus
from cachebus.bus.nats.options import NatsOptions
from cachebus.testing.servers import Server, nats_server, redis_server, run_nats

__all__ = ["nats_server", "redis_server"]

ROOT = Path(__file__).parents[3]

Connect = Callable[..., Awaitable[NatsBus]]
"""Open a bus on the test's server. Keywords are `NatsOptions` and `namespace`."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Use asyncio only, as nats-py does."""
    return "asyncio"


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    """Return a unique namespace, because tests share the server."""
    return f"t{os.urandom(6).hex()}"


def options(server: Server, **given: Any) -> NatsOptions:
    """Return options for a test's server."""
    return NatsOptions(servers=(f"{server.host}:{server.port}",), **given)


@pytest.fixture
async def connect(nats_server: Server, namespace: str) -> AsyncIterator[Connect]:
    """Return a function that opens buses. They close after the test."""
    async with AsyncExitStack() as stack:

        async def open_bus(**given: Any) -> NatsBus:
            where = given.pop("namespace", namespace)
            return await stack.enter_async_context(NatsBus(where, options(given.pop("server", nats_server), **given)))

        yield open_bus


@pytest.fixture
def own_server() -> Iterator[Server]:
    """Start a server that the test may kill."""
    with run_nats() as server:
        yield server


class WorkerProcess:
    """A process that runs `tests/bus/nats/worker.py`."""

    def __init__(self, server: Server, namespace: str, actor: str, address: str, visibility: str) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.bus.nats.worker", f"{server.host}:{server.port}"),
                *(namespace, actor, address, visibility),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def said(self) -> str:
        """Return its next line: `up`, or the reason for a failure."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        """Kill the process with SIGKILL, as in a power failure."""
        self.process.kill()
        self.process.wait()

    def leave(self) -> int:
        """Stop the process and return its exit code."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(20)


StartWorker = Callable[..., Awaitable[WorkerProcess]]


@pytest.fixture
async def start_worker(nats_server: Server, namespace: str) -> AsyncIterator[StartWorker]:
    """Return a function that starts workers and returns when they serve. They end after the test."""
    with ExitStack() as stack:

        async def start(
            actor: str, address: str, visibility: str = "shared", server: Server = nats_server
        ) -> WorkerProcess:
            worker = WorkerProcess(server, namespace, actor, address, visibility)
            stack.callback(end, worker)
            said = await anyio.to_thread.run_sync(worker.said)
            assert said == "up", said
            return worker

        yield start


def end(worker: WorkerProcess) -> None:
    """End a worker in any state."""
    worker.kill()
    for pipe in (worker.process.stdin, worker.process.stdout):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
