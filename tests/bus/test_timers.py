"""Timers: one queue for each event loop, armed from any thread, and nothing that a callback does ends it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import FrameType
from typing import Any

import anyio
import anyio.to_thread
import pytest
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from cachebus.bus import SYSTEM_CLOCK, LoopTimers, running_timers
from cachebus.bus import timers as module
from tests.clock import ManualClock

pytestmark = pytest.mark.anyio

T = 30.0
"""Seconds that nothing here takes."""


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
    """Timers of both clocks: asyncio's own timer serves one of them, a task the other."""
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
