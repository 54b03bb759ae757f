"""Real processes over a real Redis or Memcached: one load in all of them, whoever dies."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pymemcache
import pytest
import redis

from cachebus.testing.servers import Server, run_memcached, run_redis
from tests.house.paths import ROOT


@pytest.fixture(params=[run_redis, run_memcached], ids=["redis", "memcached"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with request.param() as running:
        yield running


class Process:
    """A worker under way."""

    def __init__(self, url: str, callers: int, seconds: float, lease_ttl: float) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.loading.worker", url, str(callers), str(seconds), str(lease_ttl)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )

    def says(self, what: str) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line == what

    def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise AssertionError(f"no result, exit code {self.process.wait()}")


@contextmanager
def fleet(count: int, *, url: str, callers: int, seconds: float, lease_ttl: float = 10.0) -> Iterator[list[Process]]:
    """So many workers, ready to begin."""
    processes = [Process(url, callers, seconds, lease_ttl) for _ in range(count)]
    try:
        for each in processes:
            each.says("ready")
        yield processes
    finally:
        for each in processes:
            each.process.kill()
            each.process.communicate()


@pytest.mark.parametrize("count", [2, 4])
def test_1000_callers_in_several_processes_make_one_load(server: Server, count: int) -> None:
    with fleet(count, url=server.url, callers=1000 // count, seconds=0.01) as processes:
        for each in processes:
            each.begin()
        results = [each.result() for each in processes]
    assert sum(result["loads"] for result in results) == 1
    assert [result["values"] for result in results] == [["value"]] * count
    assert sum(result["answers"] for result in results) == 1000


def test_when_whoever_loads_is_killed_there_is_exactly_one_more_load(server: Server) -> None:
    with fleet(3, url=server.url, callers=50, seconds=1.0, lease_ttl=0.5) as processes:
        first, *others = processes
        first.begin()
        first.says("loading")
        for each in others:
            each.begin()
        first.process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        results = [each.result() for each in others]
        took = time.monotonic() - killed
    assert sum(result["loads"] for result in results) == 1
    assert [result["values"] for result in results] == [["value"]] * 2
    assert took < 0.5 + 1.0 + 1.5, "the lease, the load, and a little"


def test_whoever_was_stopped_for_longer_than_its_lease_does_not_store(server: Server) -> None:
    with fleet(2, url=server.url, callers=1, seconds=0.3, lease_ttl=0.5) as (paused, other):
        paused.begin()
        paused.says("loading")
        paused.process.send_signal(signal.SIGSTOP)
        other.begin()
        assert other.result()["loads"] == 1
        stored = server_version(server)
        paused.process.send_signal(signal.SIGCONT)
        result = paused.result()
    assert result["values"] == ["value"], "its callers have what it has loaded"
    assert server_version(server) == stored, "and the store what the other has"


def server_version(server: Server) -> Any:
    """The version of the entry under the key, read past cachebus."""
    if server.url.startswith("memcached"):
        client = pymemcache.Client((server.host, server.port))
        generation: Any = client.get("fleet::")
        item: Any = client.gets(f"fleet:{generation.decode()}:key")
        client.close()
        assert item[0]
        return item[1]
    with redis.Redis.from_url(server.url) as client:
        raw: Any = client.get("fleet:key")
        return raw[:8]
