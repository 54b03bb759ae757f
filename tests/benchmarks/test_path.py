"""An operation makes no more calls of our own functions than its bound in `benchmarks/path.py` allows."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from benchmarks import path
from benchmarks.path import BOUNDS, OPERATIONS, REACH, Operation, Unsteady, record, run_recorded
from benchmarks.recorder import Recorder
from cachebus import open_cache, open_sync_cache
from cachebus.testing.servers import Server

from ..house.paths import ROOT


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_stays_within_its_calls(name: str) -> None:
    """In an interpreter of its own: what other tests leave behind in this one changes the path."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.path", name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_operation_has_a_bound() -> None:
    assert BOUNDS.keys() == OPERATIONS.keys()


def test_what_make_bench_asks_for_is_counted() -> None:
    assert REACH.keys() <= OPERATIONS.keys()


def test_every_operation_is_documented() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert [name for name in OPERATIONS if f"`{name}`" not in page] == []


def test_both_ends_are_counted(nats_server: Server) -> None:
    calls = record("worker-hit", {"nats": nats_server.url})
    assert {call.thread for call in calls} == {"caller", "worker"}
    assert any(call.file == "adapters/memory/store.py" for call in calls if call.thread == "worker")


def test_what_comes_back_from_a_server_is_counted(redis_server: Server) -> None:
    calls = record("redis-hit", {"redis": redis_server.url})
    assert "RedisConnection.data_received" in {call.function for call in calls}


def test_a_call_counts_when_it_begins_and_a_coroutine_that_goes_on_does_not(redis_server: Server) -> None:
    calls = record("redis-hit", {"redis": redis_server.url})
    # It is suspended until the reply is there, and goes on after `data_received`.
    assert [call.function for call in calls].count("Cache.get") == 1


def test_nothing_is_recorded_outside_of_a_recording() -> None:
    recorder = Recorder()
    with recorder.installed(), open_sync_cache() as cache:
        cache.set("key", 1)
        with recorder.recording():
            cache.get("key")
        cache.get("key")
    assert [call.depth for call in recorder.calls()] == [0, 1, 2]
    assert str(recorder.calls()[0]) == "facade/sync_cache.py: SyncCache.get"


def test_what_a_timer_starts_is_not_counted() -> None:
    recorder = Recorder()

    async def main() -> None:
        async with open_cache() as cache:
            done = asyncio.Event()

            async def get() -> None:
                await cache.get("from a task")
                done.set()

            with recorder.recording():
                asyncio.get_running_loop().call_later(0.001, lambda: tasks.append(asyncio.create_task(get())))
                await done.wait()

    tasks: list[asyncio.Task[None]] = []
    with recorder.installed():
        run_recorded(main())
    assert recorder.calls() == []


def test_an_operation_of_which_no_two_runs_agree_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @asynccontextmanager
    async def opened(*_: object) -> Any:
        async with open_cache() as cache:
            lengths: Iterator[int] = itertools.count(1000, -1)

            async def run() -> None:
                for _ in range(next(lengths)):
                    await cache.get("key")

            yield run

    monkeypatch.setattr(path, "RUNS", 3)
    monkeypatch.setattr(path, "MORE_RUNS", 10)
    monkeypatch.setitem(path.OPERATIONS, "unsteady", Operation("unsteady", opened))
    with pytest.raises(Unsteady, match="unsteady"):
        record("unsteady", {})
