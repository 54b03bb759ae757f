"""Messages to oneself, later."""

from __future__ import annotations

import sys
import threading
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio import wait_all_tasks_blocked

from cachebus.actors import Alarm
from tests.clock import ManualClock

pytestmark = pytest.mark.anyio


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def alarm(clock: ManualClock) -> AsyncIterator[Alarm]:
    alarm = Alarm(clock)
    async with anyio.create_task_group() as group:
        group.start_soon(alarm.run)
        await wait_all_tasks_blocked()
        yield alarm
        group.cancel_scope.cancel()


async def test_alarms_ring_in_the_order_of_their_times(alarm: Alarm, clock: ManualClock) -> None:
    rung: list[str] = []
    alarm.set(3.0, lambda: rung.append("third"))
    alarm.set(1.0, lambda: rung.append("first"))
    alarm.set(2.0, lambda: rung.append("second"))
    for expected in (["first"], ["first", "second"], ["first", "second", "third"]):
        clock.advance(1.0)
        await wait_all_tasks_blocked()
        assert rung == expected
    assert len(alarm) == 0


async def test_an_alarm_does_not_ring_early(alarm: Alarm, clock: ManualClock) -> None:
    rung: list[int] = []
    alarm.set(1.0, lambda: rung.append(1))
    await wait_all_tasks_blocked()
    clock.advance(0.999)
    await wait_all_tasks_blocked()
    assert rung == []


async def test_a_sooner_alarm_wakes_the_sleeper(alarm: Alarm, clock: ManualClock) -> None:
    rung: list[str] = []
    alarm.set(100.0, lambda: rung.append("late"))
    await wait_all_tasks_blocked()
    alarm.set(1.0, lambda: rung.append("soon"))
    await wait_all_tasks_blocked()
    clock.advance(1.0)
    await wait_all_tasks_blocked()
    assert rung == ["soon"]


async def test_an_alarm_is_called_off(alarm: Alarm, clock: ManualClock) -> None:
    rung: list[int] = []
    call_off = alarm.set(1.0, lambda: rung.append(1))
    alarm.set(2.0, lambda: rung.append(2))
    call_off()
    call_off()
    clock.advance(5.0)
    await wait_all_tasks_blocked()
    assert rung == [2]


async def test_an_alarm_is_set_from_any_thread_and_for_now(alarm: Alarm, clock: ManualClock) -> None:
    rung = anyio.Event()
    await anyio.to_thread.run_sync(lambda: alarm.set(-5.0, rung.set))
    with anyio.fail_after(30):
        await rung.wait()


async def test_clearing_calls_everything_off(alarm: Alarm, clock: ManualClock) -> None:
    rung: list[int] = []
    alarm.set(1.0, lambda: rung.append(1))
    alarm.clear()
    clock.advance(5.0)
    await wait_all_tasks_blocked()
    assert rung == []


def test_a_finalizer_that_sets_an_alarm_while_one_is_being_set_does_not_wait_for_itself() -> None:
    alarm = Alarm(ManualClock())
    finalized = 0

    def finalize(frame: FrameType, what: str, argument: Any) -> Any:
        """Called before each line of `Alarm.set`, as a finalizer may be."""
        nonlocal finalized
        if frame.f_code is not Alarm.set.__code__:
            return None
        if what == "line":
            sys.settrace(None)
            finalized += 1
            alarm.set(1.0, lambda: None)
            sys.settrace(finalize)
        return finalize

    def set_one() -> None:
        sys.settrace(finalize)
        try:
            alarm.set(1.0, lambda: None)
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=set_one, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert finalized > 3
    assert len(alarm) == finalized + 1


async def test_calling_one_off_leaves_the_others_in_the_order_of_their_times(alarm: Alarm, clock: ManualClock) -> None:
    rung: list[float] = []
    calls_off = [alarm.set(delay, lambda delay=delay: rung.append(delay)) for delay in (1.0, 5.0, 2.0, 6.0, 7.0, 3.0)]  # type: ignore[misc]
    calls_off[0]()
    for _ in range(7):
        clock.advance(1.0)
        await wait_all_tasks_blocked()
    assert rung == [2.0, 3.0, 5.0, 6.0, 7.0]
