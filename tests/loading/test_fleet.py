"""Real processes over Redis, Memcached and a NATS worker: one load in total, even if processes die or are stopped."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cachebus.testing.processes import suspend
from cachebus.testing.servers import Server, redis_command

from ..lateness import within
from .fleet import Shared, fleet, sharing

STOPS = int(os.environ.get("CACHEBUS_TEST_STOPS", "1"))
"""Number of times that a leaseholder is stopped; 200 in a soak test."""


@pytest.fixture(params=["redis", "memcached", "worker"])
def shared(request: pytest.FixtureRequest) -> Iterator[Shared]:
    with sharing(request.param) as shared:
        yield shared


@pytest.fixture
def redis() -> Iterator[Shared]:
    with sharing("redis") as shared:
        yield shared


@pytest.mark.parametrize("shared", ["redis", "memcached", "worker", "worker on redis"], indirect=True)
@pytest.mark.parametrize("count", [2, 4])
def test_1000_callers_in_several_processes_make_one_load(shared: Shared, count: int) -> None:
    with fleet(shared, *[("--callers", str(1000 // count))] * count) as processes:
        for each in processes:
            each.begin()
        results = [each.result() for each in processes]
    assert sum(result["loads"] for result in results) == 1
    assert [(result["values"], result["errors"]) for result in results] == [(["value"], [])] * count
    assert sum(result["answers"] for result in results) == 1000


def test_when_whoever_loads_is_killed_there_is_exactly_one_more_load(shared: Shared) -> None:
    words = ("--callers", "50", "--seconds", "1.0", "--lease-ttl", "0.5")
    with fleet(shared, words, words, words) as (first, *others):
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
    assert took < within(0.5 + 1.0), "the lease, the load, and a little"


@pytest.mark.parametrize("shared", ["redis", "memcached", "worker", "worker on redis"], indirect=True)
def test_the_error_of_a_loader_goes_to_all_who_wait_and_the_next_may_try_at_once(shared: Shared) -> None:
    waiting = ("--callers", "200", "--name", "of another")
    with fleet(shared, ("--callers", "200", "--seconds", "4.0", "--fails"), waiting, waiting) as (
        first,
        *others,
        next_,
    ):
        first.begin()
        first.says("loading")
        for each in others:
            each.begin()
        results = [each.result() for each in (first, *others)]
        next_.begin()
        last = next_.result()
    assert [result["loads"] for result in results] == [1, 0], "who waits does not load"
    assert [result["values"] for result in results] == [[], []]
    assert [result["errors"] for result in results] == [["OSError: the source is away"], ["LoaderFailed: OSError"]]
    assert (last["loads"], last["values"]) == (1, ["value of another"])
    assert last["took"] < 5, "the lease of 10 s was given back"


def test_with_a_stale_value_the_error_of_a_loader_is_nobodys(shared: Shared) -> None:
    failing = ("--callers", "20", "--seconds", "0.5", "--fails")
    with fleet(shared, ("--ttl", "0.01"), failing, failing) as (first, *others):
        first.begin()
        assert first.result()["values"] == ["value"]
        for each in others:
            each.begin()
        results = [each.result() for each in others]
    assert [(result["values"], result["errors"]) for result in results] == [(["value"], [])] * 2


def test_whoever_was_stopped_for_longer_than_its_lease_does_not_store(shared: Shared) -> None:
    for number in range(STOPS):
        key = ("--key", f"key{number}")
        paused = (*key, "--seconds", "0.2", "--lease-ttl", "0.2", "--name", "too late")
        with fleet(shared, paused, (*key, "--name", "in time"), (*key, "--name", "new")) as (stopped, loads, reads):
            stopped.begin()
            stopped.says("loading")
            suspend(stopped.process.pid)
            loads.begin()
            assert loads.result()["values"] == ["value in time"]
            stopped.process.send_signal(signal.SIGCONT)
            assert stopped.result()["values"] == ["value too late"], "its callers have what it has loaded"
            reads.begin()
            assert reads.result()["values"] == ["value in time"], "and the store has not"


def test_those_who_wait_are_told_and_do_not_ask_again_and_again(redis: Shared) -> None:
    assert redis.redis is not None
    with fleet(redis, ("--seconds", "1.0"), ("--callers", "500")) as (first, other):
        first.begin()
        first.says("loading")
        before = _calls(redis.redis, "evalsha")
        other.begin()
        waited = other.result()
        assert waited | {"took": 0} == {
            "loads": 0,
            "values": ["value"],
            "errors": [],
            "answers": 500,
            "took": 0,
        }
        asked = _calls(redis.redis, "evalsha") - before
        assert first.result()["values"] == ["value"]
    assert asked <= 2 + waited["took"] / 0.125 + 4, "no more than as a backstop, in about a second of waiting"


def _calls(server: Server, command: str) -> int:
    """Return how often a server received a command."""
    for line in redis_command(server, "INFO", "commandstats").decode().splitlines():
        if line.startswith(f"cmdstat_{command}:"):
            found: Any = line.split("calls=")[1].split(",")[0]
            return int(found)
    return 0
