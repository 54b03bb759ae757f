"""Fleet of processes that request one key together over a shared backend: Redis, Memcached or a NATS worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from cachebus.testing.servers import Server, run_memcached, run_nats, run_redis

from ..house.paths import ROOT


@dataclass(frozen=True)
class Shared:
    """Shared backend of a fleet. `words` are command line arguments for its processes."""

    words: tuple[str, ...]
    redis: Server | None = None


@contextmanager
def sharing(kind: str) -> Iterator[Shared]:
    """Start a separate server, and a worker if the backend needs one."""
    with ExitStack() as stack:
        if kind == "redis":
            redis = stack.enter_context(run_redis())
            yield Shared((redis.url,), redis)
            return
        if kind == "memcached":
            yield Shared((stack.enter_context(run_memcached()).url,))
            return
        nats = stack.enter_context(run_nats())
        backend = stack.enter_context(run_redis()).url if kind == "worker on redis" else "memory://"
        command = [
            sys.executable,
            "-m",
            "cachebus",
            "worker",
            "--bus",
            nats.url,
            "--namespace",
            "fleet",
            "--backend",
            backend,
        ]
        worker = subprocess.Popen(
            command, cwd=ROOT, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        stack.callback(_end, worker)
        assert worker.stdout is not None
        said: list[str] = []
        for line in worker.stdout:
            said.append(line)
            if "serving" in line:
                break
        else:
            raise AssertionError(f"the worker does not serve: {said}")
        yield Shared(("bus:primary", "--bus", nats.url))


class Process:
    """Running process of a fleet."""

    def __init__(self, shared: Shared, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.loading.worker", *shared.words, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=_environment(),
        )

    def says(self, what: str) -> None:
        """Wait until the process prints the word."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line == what

    def begin(self) -> None:
        """Start the callers of the process."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Return the results of the process."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise AssertionError(f"no result, exit code {self.process.wait()}")


@contextmanager
def fleet(shared: Shared, *each_words: tuple[str, ...]) -> Iterator[list[Process]]:
    """Start a process for each of `each_words`, ready to begin."""
    with ExitStack() as stack:
        processes: list[Process] = []
        for words in each_words:
            processes.append(Process(shared, *words))
            stack.callback(_end, processes[-1].process)
        for process in processes:
            process.says("ready")
        yield processes


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CACHEBUS_")}


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
