"""Renewals happen in time on any thread, and a failed renewal does not affect others."""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Callable

import pytest

from cachebus.bus import SYSTEM_CLOCK, running_timers
from cachebus.client.renewals import TOGETHER, Renewals
from cachebus.testing.fakes import ManualTimers

from ..clock import ManualClock


class Stage:
    """Renewals on a manual clock, each with an interval of three seconds."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.now = self.clock.monotonic
        self.timers = ManualTimers(self.clock)
        self.renewals = Renewals()
        self.renewed: Counter[str] = Counter()

    def track(self, name: str, interval: float = 3.0) -> None:
        def renew() -> float:
            self.renewed[name] += 1
            return self.now() + interval

        self.renewals.track(name, self.timers, self.now() + interval, renew)

    def advance(self, seconds: float) -> None:
        until = self.now() + seconds
        while (due := self.timers.due()) <= until:
            self.clock.advance(max(0.0, due - self.now()))
            self.timers.fire()
        self.clock.advance(until - self.now())


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_what_is_tracked_is_renewed_until_it_is_not_tracked_any_more(stage: Stage) -> None:
    stage.track("a")
    stage.advance(1.0)
    stage.track("b")
    stage.advance(8.5)
    assert stage.renewed == {"a": 3, "b": 2}
    stage.renewals.untrack("a")
    stage.renewals.untrack("a")
    stage.advance(3.0)
    assert stage.renewed == {"a": 3, "b": 3}
    stage.renewals.untrack("b")
    stage.advance(3.0)
    assert len(stage.timers) == 0


def test_one_that_is_due_sooner_is_not_kept_by_the_others(stage: Stage) -> None:
    stage.track("slow", 100.0)
    stage.track("quick", 1.0)
    stage.advance(5.5)
    assert stage.renewed == {"quick": 5}


def test_many_have_one_timer_and_are_renewed_together(stage: Stage) -> None:
    for number in range(1000):
        stage.track(f"k{number}")
        stage.clock.advance(1e-5)
    assert len(stage.timers) == 1
    fired = 0
    for _ in range(1000):
        if (due := stage.timers.due()) > stage.now() + 3.1:
            break
        stage.clock.advance(max(0.0, due - stage.now()))
        stage.timers.fire()
        fired += 1
        if min(stage.renewed[f"k{number}"] for number in range(1000)):
            break
    assert fired <= 1 + 1000 * 1e-5 / TOGETHER


def test_what_is_renewed_by_somebody_else_says_later_when_it_is_due_next(stage: Stage) -> None:
    asked: list[float] = []
    stage.renewals.track("a", stage.timers, stage.now() + 1.0, lambda: asked.append(stage.now()))
    stage.advance(10.0)
    assert len(asked) == 1, "it is not known yet what came of the first"
    stage.renewals.postpone("a", stage.timers, stage.now() + 2.0)
    stage.advance(1.9)
    assert len(asked) == 1
    stage.advance(0.2)
    assert len(asked) == 2
    stage.renewals.untrack("a")
    stage.renewals.postpone("a", stage.timers, stage.now() + 2.0)
    stage.advance(5.0)
    assert len(asked) == 2


def test_what_says_at_once_when_it_is_due_next_is_renewed_then(stage: Stage) -> None:
    asked: list[float] = []

    def renew() -> None:
        asked.append(stage.now())
        stage.renewals.postpone("a", stage.timers, stage.now() + 1.0)

    stage.renewals.track("a", stage.timers, stage.now() + 1.0, renew)
    stage.advance(5.5)
    assert len(asked) == 5


def test_two_timers_of_a_race_become_one(stage: Stage) -> None:
    stage.track("a")
    # The state after two threads both saw that no timer was armed.
    for due in (1.0, 2.0, 3.0, 3.0):
        stage.renewals._arm(stage.timers, stage.now() + due)
    stage.advance(4.0)
    assert len(stage.timers) == 1
    assert stage.renewed == {"a": 1}


@pytest.mark.anyio
async def test_a_renewal_that_raises_is_logged_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    import anyio

    clock, renewals = ManualClock(), Renewals()
    timers = running_timers(clock)
    renewed: list[int] = []

    def fail() -> float:
        raise ValueError("no")

    def renew(number: int) -> Callable[[], float]:
        def once_more() -> float:
            renewed.append(number)
            return clock.monotonic() + 1.0

        return once_more

    for number in range(3):
        renewals.track(f"before {number}", timers, clock.monotonic() + 1.0, renew(number))
    renewals.track("fails", timers, clock.monotonic() + 1.0, fail)
    for number in range(3, 6):
        renewals.track(f"after {number}", timers, clock.monotonic() + 1.0, renew(number))
    with caplog.at_level(logging.ERROR, "cachebus.bus"):
        for _ in range(2):
            clock.advance(1.0)
            await anyio.wait_all_tasks_blocked()
            await anyio.wait_all_tasks_blocked()
    timers.close()
    assert Counter(renewed) == Counter([*range(6)] * 2)
    assert len([each for each in caplog.records if each.name == "cachebus.bus"]) == 1
    assert timers.failures == 1


@pytest.mark.anyio
async def test_many_threads_track_at_once_and_each_is_renewed() -> None:
    import anyio
    import anyio.to_thread

    timers, renewals = running_timers(), Renewals()
    seen: set[str] = set()
    now = SYSTEM_CLOCK.monotonic
    barrier = threading.Barrier(4)

    def track(thread: int) -> None:
        barrier.wait(30)
        for number in range(200):
            name = f"{thread} {number}"
            renewals.track(name, timers, now() + 0.001, lambda name=name: (seen.add(name), math.inf)[1])  # type: ignore[misc,func-returns-value]

    async with anyio.create_task_group() as group:
        for thread in range(4):
            group.start_soon(anyio.to_thread.run_sync, track, thread)
    with anyio.fail_after(30):
        while len(seen) < 800:
            await anyio.sleep(0.001)
    timers.close()
