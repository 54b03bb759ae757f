"""Timers: one queue for each event loop, armed from any thread. No callback can end it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import os
import random
import sys
import threading
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from cachebus.bus import SYSTEM_CLOCK, LoopTimers, running_timers

from ..clock import ManualClock

pytestmark = pytest.mark.anyio

T = 30.0
"""Timeout in seconds that no test reaches."""


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def timers(clock: ManualClock) -> AsyncIterator[LoopTimers]:
    timers = running_timers(clock)
    yield timers
    timers.close()


@pytest.fixture(params=["system", "manual"])
async def either(request: pytest.FixtureRequest, clock: ManualClock) -> AsyncIterator[LoopTimers]:
    """Return timers of both clocks: one uses asyncio's own timer, the other a task."""
    timers = running_timers(SYSTEM_CLOCK if request.param == "system" else clock)
    yield timers
    timers.close()


async def elapse(clock: ManualClock, seconds: float) -> None:
    clock.advance(seconds)
    await wait_all_tasks_blocked()


async def test_callbacks_come_in_the_order_of_their_times(timers: LoopTimers, clock: ManualClock) -> None:
    called: list[str] = []
    timers.call_after(3.0, lambda: called.append("third"))
    timers.call_after(1.0, lambda: called.append("first"))
    timers.call_at(clock.monotonic() + 2.0, lambda: called.append("second"))
    for expected in (["first"], ["first", "second"], ["first", "second", "third"]):
        await elapse(clock, 1.0)
        assert called == expected
    assert len(timers) == 0


async def test_a_callback_does_not_come_early(timers: LoopTimers, clock: ManualClock) -> None:
    called: list[int] = []
    timers.call_after(1.0, lambda: called.append(1))
    await elapse(clock, 0.999)
    assert called == []


async def test_what_is_due_at_the_same_time_comes_in_the_order_of_arming(
    timers: LoopTimers, clock: ManualClock
) -> None:
    called: list[int] = []
    for number in range(1000):
        timers.call_after(1.0, lambda number=number: called.append(number))  # type: ignore[misc]
    await elapse(clock, 1.0)
    assert called == list(range(1000))


async def test_a_sooner_timer_is_not_kept_by_a_later_one(timers: LoopTimers, clock: ManualClock) -> None:
    called: list[str] = []
    timers.call_after(100.0, lambda: called.append("late"))
    await wait_all_tasks_blocked()
    timers.call_after(1.0, lambda: called.append("soon"))
    await elapse(clock, 1.0)
    assert called == ["soon"]
    await elapse(clock, 99.0)
    assert called == ["soon", "late"]


async def test_a_cancelled_timer_is_not_called_back(timers: LoopTimers, clock: ManualClock) -> None:
    called: list[int] = []
    timer = timers.call_after(1.0, lambda: called.append(1))
    timers.call_after(2.0, lambda: called.append(2))
    timer.cancel()
    timer.cancel()
    assert len(timers) == 1
    await elapse(clock, 5.0)
    assert called == [2]


async def test_cancelling_leaves_the_others_in_the_order_of_their_times(timers: LoopTimers, clock: ManualClock) -> None:
    called: list[float] = []
    armed = [
        timers.call_after(delay, lambda delay=delay: called.append(delay))  # type: ignore[misc]
        for delay in (1.0, 5.0, 2.0, 6.0, 7.0, 3.0)
    ]
    armed[0].cancel()
    for _ in range(7):
        await elapse(clock, 1.0)
    assert called == [2.0, 3.0, 5.0, 6.0, 7.0]


async def test_a_callback_cancels_another_that_is_due_as_well(timers: LoopTimers, clock: ManualClock) -> None:
    called: list[str] = []
    timers.call_after(1.0, lambda: other.cancel())  # noqa: PLW0108
    other = timers.call_after(1.0, lambda: called.append("other"))
    timers.call_after(1.0, lambda: called.append("third"))
    await elapse(clock, 1.0)
    assert called == ["third"]


async def test_a_timer_that_was_called_back_may_be_cancelled(timers: LoopTimers, clock: ManualClock) -> None:
    timer = timers.call_after(1.0, lambda: None)
    await elapse(clock, 1.0)
    timer.cancel()
    assert repr(timer).endswith("over>")


async def test_it_works_by_the_clock_of_the_system(either: LoopTimers, clock: ManualClock) -> None:
    called: list[str] = []
    done = anyio.Event()
    either.call_after(0.02, lambda: called.append("second"))
    either.call_after(0.0, lambda: called.append("first"))
    either.call_after(0.02, done.set)
    either.call_after(3600.0, lambda: called.append("never"))
    clock.advance(0.02)
    with anyio.fail_after(T):
        await done.wait()
    assert called == ["first", "second"]


async def test_a_timer_is_armed_and_cancelled_from_any_thread(either: LoopTimers, clock: ManualClock) -> None:
    done, cancelled = anyio.Event(), threading.Event()
    called: list[str] = []

    def arm() -> None:
        either.call_after(3600.0, lambda: called.append("never"))
        # If this thread is delayed, the callback may run before the cancellation, but not after it.
        timer = either.call_after(0.05, lambda: called.append("cancelled") if cancelled.is_set() else None)
        timer.cancel()
        cancelled.set()
        either.call_after(-5.0, done.set)

    await anyio.to_thread.run_sync(arm)
    with anyio.fail_after(T):
        await done.wait()
    clock.advance(0.1)
    await anyio.sleep(0.1)
    assert called == []


async def test_thousands_of_timers_from_many_threads_each_come_once(either: LoopTimers, clock: ManualClock) -> None:
    threads, each = 4, 2000
    called: list[int] = []
    kept: set[int] = set()

    def arm(thread: int) -> None:
        chance = random.Random(thread)
        for number in range(thread * each, (thread + 1) * each):
            timer = either.call_after(chance.choice((0.0, 0.001, 0.01)), lambda number=number: called.append(number))  # type: ignore[misc]
            if number % 3 == 0:
                timer.cancel()
            else:
                kept.add(number)

    async with anyio.create_task_group() as group:
        for thread in range(threads):
            group.start_soon(anyio.to_thread.run_sync, arm, thread)
    with anyio.fail_after(T):
        while not kept <= set(called):
            clock.advance(0.01)
            await checkpoint()
    # A timer that was due at once may have run before its cancellation.
    assert len(called) == len(set(called))
    assert len(either) == 0


async def test_what_other_threads_cancel_is_not_kept(either: LoopTimers) -> None:
    either.call_after(3600.0, lambda: None)
    loop = either._loop
    assert loop is not None

    def arm_and_cancel() -> None:
        for _ in range(10_000):
            either.call_after(7200.0, lambda: None).cancel()

    await anyio.to_thread.run_sync(arm_and_cancel)
    with anyio.fail_after(T):
        while len(loop._changed) > 1001:
            await checkpoint()
    assert len(either) == 1
    assert len(loop._queue._heap) < 200


@pytest.mark.parametrize("error", [ValueError, anyio.BrokenResourceError, RecursionError])
async def test_a_callback_that_raises_is_logged_once_and_counted_and_harms_no_other(
    either: LoopTimers, clock: ManualClock, caplog: pytest.LogCaptureFixture, error: type[Exception]
) -> None:
    called: list[str] = []

    def fail() -> None:
        raise error

    with caplog.at_level(logging.ERROR, "cachebus.bus"):
        for _ in range(3):
            either.call_after(0.0, fail)
        done = anyio.Event()
        either.call_after(0.0, lambda: called.append("after"))
        either.call_after(0.0, done.set)
        clock.advance(0.001)
        with anyio.fail_after(T):
            await done.wait()
    assert called == ["after"]
    assert either.failures == 3
    assert len([each for each in caplog.records if each.name == "cachebus.bus"]) == 1


async def test_callbacks_that_arm_for_now_leave_others_their_turn(either: LoopTimers) -> None:
    rounds = 0

    def again() -> None:
        nonlocal rounds
        rounds += 1
        either.call_after(0.0, again)

    again()
    with anyio.fail_after(T):
        while rounds < 10:
            await checkpoint()
    either.close()
    before = rounds
    await anyio.sleep(0.01)
    assert rounds == before


async def test_a_callback_runs_outside_the_context_of_whoever_armed_it(either: LoopTimers, clock: ManualClock) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="nothing")
    variable.set("a secret of the one who armed it")
    seen: list[str] = []
    done = anyio.Event()
    either.call_after(0.0, lambda: seen.append(variable.get()))
    either.call_after(0.0, done.set)
    with anyio.fail_after(T):
        await done.wait()
    assert seen == ["nothing"]


async def test_closing_cancels_everything_and_leaves_nothing_running(
    timers: LoopTimers, clock: ManualClock, anyio_backend: str
) -> None:
    called: list[int] = []
    timers.call_after(1.0, lambda: called.append(1))
    await wait_all_tasks_blocked()
    assert clock.sleepers == 1
    timers.close()
    timers.close()
    timers.call_after(1.0, lambda: called.append(2))
    await wait_all_tasks_blocked()
    assert clock.sleepers == 0
    await elapse(clock, 5.0)
    assert (called, len(timers)) == ([], 0)


async def test_closing_within_a_callback_cancels_what_is_due_as_well(timers: LoopTimers, clock: ManualClock) -> None:
    called: list[int] = []
    timers.call_after(1.0, timers.close)
    timers.call_after(1.0, lambda: called.append(1))
    await elapse(clock, 1.0)
    assert called == []
    assert clock.sleepers == 0


async def test_owners_on_a_loop_share_a_queue_and_close_their_own(either: LoopTimers) -> None:
    first, second = running_timers(), running_timers()
    assert first._loop is second._loop
    called: list[str] = []
    done = anyio.Event()
    first.call_after(0.0, lambda: called.append("first"))
    second.call_after(0.01, lambda: called.append("second"))
    second.call_after(0.01, done.set)
    first.close()
    with anyio.fail_after(T):
        await done.wait()
    assert called == ["second"]
    assert (len(first), len(second)) == (0, 0)


async def test_the_loop_has_one_timer_however_many_there_are(anyio_backend: str) -> None:
    if anyio_backend != "asyncio":
        return
    loop: Any = asyncio.get_running_loop()
    before = sum(not each._cancelled for each in loop._scheduled)
    timers = running_timers()
    for number in range(1000):
        timers.call_after(3600.0 - number, lambda: None)
    assert sum(not each._cancelled for each in loop._scheduled) <= before + 1
    timers.close()
    assert sum(not each._cancelled for each in loop._scheduled) <= before


def test_nothing_is_called_back_before_the_start_and_after_the_loop() -> None:
    timers = LoopTimers()
    timers.call_after(0.0, lambda: None).cancel()

    async def main() -> None:
        timers.start()
        timers.call_after(3600.0, lambda: None)

    asyncio.run(main())
    for _ in range(3):
        timers.call_after(0.0, lambda: None).cancel()
    thread = threading.Thread(target=timers.call_after, args=(0.0, lambda: None))
    thread.start()
    thread.join(T)
    assert not thread.is_alive()
    assert timers._loop is not None
    assert not timers._loop._changed
    timers.close()


@pytest.mark.parametrize("seconds", [float("inf"), 1e300, 1e9])
async def test_a_timer_may_be_as_far_off_as_one_likes(either: LoopTimers, seconds: float) -> None:
    called: list[int] = []
    either.call_after(seconds, lambda: called.append(1))
    done = anyio.Event()
    either.call_after(0.0, done.set)
    with anyio.fail_after(T):
        await done.wait()
    assert called == []


def test_an_instant_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        LoopTimers().call_at(float("nan"), lambda: None)


@pytest.mark.parametrize("what", ["arm", "cancel"])
async def test_a_finalizer_may_arm_and_cancel_in_the_middle_of_everything(
    timers: LoopTimers, clock: ManualClock, what: str
) -> None:
    """Run a finalizer once before each line of the queue's code, on the loop's thread."""
    from cachebus.bus import timers as module

    files = {module.__file__}
    called = finalized = 0
    seen: set[object] = set()
    others = [timers.call_after(50.0, lambda: None) for _ in range(10_000)]

    def count() -> None:
        nonlocal called
        called += 1

    def finalize(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal finalized
        if frame.f_code.co_filename not in files:
            return None
        if event == "line" and (where := (frame.f_code, frame.f_lineno)) not in seen:
            seen.add(where)
            sys.settrace(None)
            finalized += 1
            timers.call_after(1.0 / finalized, count)
            if what == "cancel":
                others.pop().cancel()
            sys.settrace(finalize)
        return finalize

    sys.settrace(finalize)
    try:
        for delay in (3.0, 2.0, 1.0):
            timers.call_after(delay, count)
        timers.call_after(2.0, count).cancel()
    finally:
        sys.settrace(None)
    assert finalized > 30
    assert len(timers) == finalized + 3 + len(others)
    for _ in range(3):
        await elapse(clock, 1.0)
    assert called == finalized + 3


async def test_a_real_finalizer_may_arm_on_the_thread_of_a_loop_that_is_being_armed(either: LoopTimers) -> None:
    called = made = 0

    def count() -> None:
        nonlocal called
        called += 1

    class Finalized:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            either.call_after(0.0, count)

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            made += 1
            Finalized()
            either.call_after(3600.0, lambda: None).cancel()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    with anyio.fail_after(T):
        while called < made:
            await checkpoint()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_of_a_fork_has_a_loop_and_timers_of_its_own() -> None:
    async def main() -> None:
        parents = running_timers()
        parents.call_after(0.0, lambda: os._exit(1) if os.getpid() != parent else None)
        timers.append(parents)
        if (child := os.fork()) == 0:
            os._exit(0 if in_child() else 2)
        with anyio.fail_after(T):
            while (found := os.waitpid(child, os.WNOHANG))[0] == 0:  # noqa: ASYNC222
                await anyio.sleep(0.01)
        assert os.waitstatus_to_exitcode(found[1]) == 0

    def in_child() -> bool:
        asyncio.events._set_running_loop(None)
        timers[0].forked()
        timers[0].call_after(0.0, lambda: os._exit(1)).cancel()
        called: list[int] = []

        async def again() -> None:
            mine, done = running_timers(), asyncio.Event()
            mine.call_after(0.0, lambda: called.append(1))
            mine.call_after(0.01, done.set)
            await asyncio.wait_for(done.wait(), T)

        asyncio.run(again())
        return called == [1]

    timers: list[LoopTimers] = []
    parent = os.getpid()
    asyncio.run(main())
