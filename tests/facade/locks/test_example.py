"""`examples/fencing.py` on every store with locks."""

from __future__ import annotations

import runpy
import subprocess
import sys
from typing import Any

import pytest

from cachebus.testing.servers import run_memcached, run_redis

from ...house.paths import ROOT

STORY = [
    "slow acquires the lock and reads 100",
    "quick acquires the lock, with a larger token: True",
    "quick withdraws 30: True",
    "slow resumes and withdraws 50 of the 100 that it read: False",
    "slow can see that it lost the lock: True",
    "slow releases the lock: LockNotHeld",
    "the balance is 70",
]


def test_the_example_runs_by_itself() -> None:
    command = [sys.executable, "examples/fencing.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, STORY, "")


@pytest.mark.parametrize("store", ["redis", "memcached"])
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_late_write_is_refused_on_every_store(store: str, anyio_backend: str) -> None:
    play: Any = runpy.run_path(str(ROOT / "examples" / "fencing.py"))["play"]
    with run_redis() if store == "redis" else run_memcached() as server:
        assert await play(server.url if store == "redis" else f"memcached://127.0.0.1:{server.port}") == STORY
