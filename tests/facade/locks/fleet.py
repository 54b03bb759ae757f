"""Processes that want locks, as a test sees them."""

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
    """A `tests.facade.locks.worker` under way."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "tests.facade.locks.worker", *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def tell(self, *words: object) -> None:
        """Give a command."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()

    async def hears(self) -> str:
        """What it says next."""
        assert self._process.stdout is not None
        return (await anyio.to_thread.run_sync(self._process.stdout.readline)).strip()

    async def do(self, *words: object) -> str:
        """Give a command, and wait for what comes of it."""
        self.tell(*words)
        return await self.hears()

    def kill(self) -> None:
        """End it as a power failure would."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stop it in its tracks."""
        suspend(self._process.pid)

    def resume(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Be rid of it."""
        self._process.kill()
        self._process.communicate()


@asynccontextmanager
async def fleet(count: int, *arguments: str) -> AsyncGenerator[list[Process]]:
    """So many processes, ready to be told."""
    processes = [Process(*arguments) for _ in range(count)]
    try:
        for each in processes:
            assert await each.hears() == "ready"
        yield processes
    finally:
        for each in processes:
            each.end()


class Resource:
    """What a lock protects, and what makes it safe: it takes no write with a token older than one that it has seen."""

    def __init__(self) -> None:
        self.newest = 0
        self.refused = 0

    def write(self, token: int) -> bool:
        """Whether the write was taken."""
        if token < self.newest:
            self.refused += 1
            return False
        self.newest = token
        return True


def token_of(said: str) -> int:
    """The token in what a process says that has a lock."""
    word, _, token = said.partition(" ")
    assert word == "had", said
    return int(token)


def check_journal(text: str) -> list[int]:
    """The tokens of a journal, in the order of entering. Nobody entered before the one before had left."""
    lines = [line.split() for line in text.splitlines()]
    entries, exits = lines[::2], lines[1::2]
    assert [word for word, _ in entries] == ["enter"] * len(entries)
    assert [word for word, _ in exits] == ["leave"] * len(entries)
    tokens = [int(token) for _, token in entries]
    assert tokens == [int(token) for _, token in exits]
    return tokens
