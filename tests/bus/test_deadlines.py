"""Deadlines: never early, at most one tick late, one timer for many, and no upper limit."""

from __future__ import annotations

import asyncio
import heapq
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachebus.bus import ThreadPort, open_port
from cachebus.bus.clock import TICKS, Deadlines, running_deadlines


class FakeLoop:
    """Clock and timers of a loop, advanced manually."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now
        self.timers: list[tuple[float, int, Callable[[], Any]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[..., Any], *rest: Any) -> None:
        heapq.heappush(self.timers, (when, len(self.timers), lambda: call(*rest)))

    def run_until(self, instant: float) -> None:
        while self.timers and self.timers[0][0] <= instant:
            when, _, call = heapq.heappop(self.timers)
            self.now = max(self.now, when)
            call()
        self.now = instant


class Waiter:
    """Port that records its answers and their times."""

    def __init__(self, loop: FakeLoop) -> None:
        self.loop = loop
        self.answers: list[tuple[float, Any]] = []

    def answer(self, reply: Any) -> None:
        self.answers.append((self.loop.now, reply))


@given(
    now=st.floats(0.0, 1e6),
    calls=st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(1e-6, 5.0)), min_size=1, max_size=30),
)
def test_a_deadline_is_met_within_a_tick_and_never_early(now: float, calls: list[tuple[float, float]]) -> None:
    loop = FakeLoop(now)
    deadlines = Deadlines(loop)  # type: ignore[arg-type]
    waiting: list[tuple[Waiter, float]] = []
    for pause, timeout in calls:
        loop.run_until(loop.now + pause)
        waiter = Waiter(loop)
        waiting.append((waiter, loop.now + timeout))
        deadlines.watch(waiter, timeout, lambda: "late")
    loop.run_until(loop.now + 10.0)
    for waiter, deadline in waiting:
        ((answered, reply),) = waiter.answers
        assert reply == "late"
        assert deadline - 1e-6 <= answered <= deadline + 1 / TICKS + 1e-6
    assert deadlines._buckets == {}


def test_who_is_taken_out_of_its_bucket_hears_nothing() -> None:
    loop = FakeLoop()
    deadlines = Deadlines(loop)  # type: ignore[arg-type]
    gone, stays = Waiter(loop), Waiter(loop)
    bucket = deadlines.watch(gone, 1.0, lambda: "late")
    assert deadlines.watch(stays, 1.0, lambda: "late") is bucket
    del bucket[gone]
    loop.run_until(2.0)
    assert gone.answers == []
    assert [reply for _, reply in stays.answers] == ["late"]


def test_a_thousand_deadlines_of_a_second_need_no_more_timers_than_it_has_ticks() -> None:
    loop = FakeLoop()
    deadlines = Deadlines(loop)  # type: ignore[arg-type]
    for number in range(1000):
        deadlines.watch(Waiter(loop), 1.0 + number / 1000, lambda: None)
    assert len(loop.timers) <= TICKS + 1


def test_every_loop_has_deadlines_of_its_own() -> None:
    async def mine() -> Deadlines:
        loop = asyncio.get_running_loop()
        deadlines = running_deadlines()
        assert deadlines is not None
        assert deadlines.loop is loop
        assert running_deadlines() is deadlines
        return deadlines

    elsewhere: list[Deadlines] = []
    thread = threading.Thread(target=lambda: elsewhere.append(asyncio.run(mine())))
    thread.start()
    thread.join()
    assert len({id(each) for each in (asyncio.run(mine()), asyncio.run(mine()), *elsewhere)}) == 3


@pytest.mark.anyio
@pytest.mark.parametrize("timeout", [float("inf"), 1e300, threading.TIMEOUT_MAX * 2, 1e9])
async def test_a_task_may_wait_for_as_long_as_it_likes(timeout: float) -> None:
    port = open_port()
    async with anyio.create_task_group() as group:
        heard: list[Any] = []

        async def wait() -> None:
            heard.append(await port.wait(timeout, lambda: "late"))

        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        port.answer("in time")
    assert heard == ["in time"]


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, threading.TIMEOUT_MAX * 2, 1e9, None])
def test_a_thread_may_wait_for_as_long_as_it_likes(timeout: float | None) -> None:
    port = ThreadPort()
    threading.Thread(target=port.answer, args=("in time",)).start()
    assert port.wait(timeout, lambda: "late") == "in time"


@pytest.mark.anyio
async def test_an_answer_that_meets_its_deadline_is_given_once() -> None:
    for _ in range(20):
        port = open_port()
        thread = threading.Thread(target=port.answer, args=("in time",))
        async with anyio.create_task_group() as group:
            heard: list[Any] = []

            async def wait(port: Any = port, heard: list[Any] = heard) -> None:
                heard.append(await port.wait(1e-9, lambda: "late"))

            group.start_soon(wait)
            thread.start()
        await anyio.to_thread.run_sync(thread.join)
        await anyio.lowlevel.checkpoint()
        assert heard in (["in time"], ["late"])
        assert not port.waiting
