"""Workers in processes of their own, as the command line starts them."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from cachebus.testing.servers import Server, nats_server, redis_server

__all__ = ["nats_server", "redis_server"]

ROOT = Path(__file__).parents[2]
LIMIT = 40.0
"""Seconds after which what a test waits for has failed to come."""


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """nats-py knows asyncio only."""
    return "asyncio"


@pytest.fixture
def namespace() -> str:
    """A namespace of the test's own, on servers that are everybody's."""
    return f"t{os.urandom(6).hex()}"


@pytest.fixture(autouse=True)
def an_environment_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CACHEBUS_") and not name.startswith("CACHEBUS_TEST_"):
            monkeypatch.delenv(name)


class WorkerProcess:
    """`python -m cachebus worker`. What it writes is kept in `lines`."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cachebus", "worker", *arguments],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self._coming: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, text: str) -> str:
        """The next line with `text` in it. Fails if the worker ends before, or says nothing of the kind in time."""
        while True:
            line = self._coming.get(timeout=LIMIT)
            assert line is not None, f"no {text!r} in {self.lines}"
            if text in line:
                return line

    def signal(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait until it has ended by itself, and everything that it said is read."""
        code = self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        return code

    def kill(self) -> None:
        """End it as a power failure would."""
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        self._reader.join(LIMIT)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            self._coming.put(line)
        self._coming.put(None)


RunWorker = Callable[..., WorkerProcess]


@pytest.fixture
def run_worker(nats_server: Server, namespace: str) -> Iterator[RunWorker]:
    """Starts workers, returns when they serve, and ends them after the test."""
    with ExitStack() as stack:

        def run(*arguments: str, server: Server = nats_server, serves: bool = True) -> WorkerProcess:
            worker = WorkerProcess("--bus", server.url, "--namespace", namespace, *arguments)
            stack.callback(worker.kill)
            if serves:
                worker.wait_for("serving")
            return worker

        yield run
