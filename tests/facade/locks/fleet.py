"""Processes that take locks, controlled by a test."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import anyio.to_thread

from cachebus.testing.processes import suspend

from ...house.paths import ROOT


class Process:
    """Running `tests.facade.locks.worker`."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.facade.locks.worker", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def tell(self, *words: object) -> None:
        """Send a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    async def hears(self) -> str:
        """Return its next line."""
        assert self._process.stdout is not None
        return (await anyio.to_thread.run_sync(self._process.stdout.readline)).strip()

    async def do(self, *words: object) -> str:
        """Send a command, and return its result."""
        self.tell(*words)
        return await self.hears()

    def kill(self) -> None:
        """Kill the process with SIGKILL, as in a power failure."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Pause the process, and return when it has stopped."""
        suspend(self._process.pid)

    def resume(self) -> None:
        """Resume the process."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill the process and release its pipes."""
        self._process.kill()
        self._process.communicate()


@asynccontextmanager
async def fleet(count: int, *arguments: str) -> AsyncGenerator[list[Process]]:
    """Start `count` processes, ready for commands."""
    processes = [Process(*arguments) for _ in range(count)]
    try:
        for each in processes:
            assert await each.hears() == "ready"
        yield processes
    finally:
        for each in processes:
            each.end()


class Resource:
    """Resource protected by a lock. It refuses writes with a token older than the newest one seen."""

    def __init__(self) -> None:
        self.newest = 0
        self.refused = 0

    def write(self, token: int) -> bool:
        """Return `True` if the write was accepted."""
        if token < self.newest:
            self.refused += 1
            return False
        self.newest = token
        return True


def token_of(said: str) -> int:
    """Return the token from the line of a process that acquired a lock."""
    word, _, token = said.partition(" ")
    assert word == "had", said
    return int(token)


def check_journal(text: str) -> list[int]:
    """Return the tokens of a journal in the order of entering, and check that no two callers overlap."""
    lines = [line.split() for line in text.splitlines()]
    entries, exits = lines[::2], lines[1::2]
    assert [word for word, _ in entries] == ["enter"] * len(entries)
    assert [word for word, _ in exits] == ["leave"] * len(entries)
    tokens = [int(token) for _, token in entries]
    assert tokens == [int(token) for _, token in exits]
    return tokens
