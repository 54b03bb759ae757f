"""Four processes with many callers each share one limit, and together get exactly that limit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from subprocess import PIPE
from typing import Any
from uuid import uuid4

import pytest

from cachebus.testing.servers import run_memcached, run_nats, run_redis

from ...house.paths import ROOT
from ...node.conftest import WorkerProcess

PROCESSES = 4
CALLERS = 50


@pytest.fixture(scope="module", params=["redis", "memcached", "worker"])
def where(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Return the arguments that open a cache, for each kind of backend."""
    with ExitStack() as stack:
        if request.param == "redis":
            yield {"backend": stack.enter_context(run_redis()).url}
        elif request.param == "memcached":
            yield {"backend": stack.enter_context(run_memcached()).url}
        else:
            bus = stack.enter_context(run_nats()).url
            worker = WorkerProcess("--bus", bus, "--namespace", "limits", "--backend", "primary=memory://")
            stack.callback(worker.kill)
            worker.wait_for("serving")
            yield {"backend": "bus:primary", "bus": bus, "namespace": "limits"}


Fleet = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def fleet(where: dict[str, Any]) -> Iterator[Fleet]:
    """Return a function that runs the processes concurrently, and returns their results."""
    processes: list[subprocess.Popen[str]] = []

    def run(**options: Any) -> list[dict[str, Any]]:
        told = json.dumps({"namespace": f"t{uuid4().hex}", **where, "callers": CALLERS, **options})
        command = [sys.executable, "-m", "tests.facade.rate_limits.worker", told]
        processes.extend(
            subprocess.Popen(command, text=True, cwd=ROOT, stdin=PIPE, stdout=PIPE) for _ in range(PROCESSES)
        )
        for each in processes:
            assert each.stdout is not None
            assert each.stdout.readline().strip() == "ready"
        for each in processes:
            assert each.stdin is not None
            each.stdin.write("\n")
            each.stdin.flush()
        return [json.loads(each.communicate(timeout=60)[0]) for each in processes]

    yield run
    for each in processes:
        each.kill()
        each.communicate()


def test_all_together_are_admitted_exactly_as_often_as_the_limit_says(fleet: Fleet) -> None:
    results = fleet(seconds=0.5, limit={"limit": 300, "per": 36_000}, until_refused=True)
    assert sum(len(result["went"]) for result in results) == 300
    assert all(result["refused"] > 0 for result in results)


def test_who_may_wait_goes_on_at_the_rate_of_the_limit(fleet: Fleet, where: dict[str, Any]) -> None:
    results = fleet(seconds=0.5, limit={"limit": 200, "per": 2, "burst": 20, "wait": 30})
    went = sorted(when for result in results for when in result["went"])
    assert sum(result["refused"] for result in results) == 0
    assert len(went) >= PROCESSES * CALLERS
    # Memcached reports whole seconds, so the clocks of the processes differ a little.
    skew = 1.0 if where["backend"].startswith("memcached") else 0.01
    began = min(result["began"] for result in results)
    for count, when in enumerate(went, 1):
        assert count <= 20 + (when - began + skew) * 100, "calls may be late, but never early"
