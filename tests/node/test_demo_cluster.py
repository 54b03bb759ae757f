"""`make demo-cluster`, a short one: it ends, and nothing is lost with the worker that is killed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from cachebus.testing.servers import find_binary

from .conftest import ROOT


@pytest.mark.parametrize("with_redis", [True, False])
def test_a_killed_worker_costs_no_answer(with_redis: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    nats = find_binary("nats-server")
    assert nats is not None
    if with_redis:
        assert find_binary("redis-server") is not None
    else:
        # Nothing is found but what the environment has among its scripts: nats-server.
        monkeypatch.setenv("PATH", "")
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo_cluster", "--seconds", "2", "--tasks", "16"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.count("started worker") == 2
    assert ("started redis" in done.stdout) is with_redis
    before, _, after = done.stdout.partition("killing worker")
    assert before.count("backend.primary") + before.count("backend.spare") >= 2
    assert after.count("backend.primary ") == 1
    since = re.search(r"([\d,]+) answers since", after)
    assert since is not None
    assert int(since[1].replace(",", "")) > 0
    assert re.search(r"lost or wrong +│ 0 ", after)
    assert "event.cache_set" in done.stdout
    assert done.stdout.endswith("nothing was lost\n")
