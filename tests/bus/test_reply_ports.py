"""Reply ports: one answer, from any thread, by the deadline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.to_thread
import pytest

from cachebus.bus import DeferredReply, ThreadPort, open_port
from cachebus.bus.clock import TICKS, Deadlines
from cachebus.messages import Missing, Pong

pytestmark = pytest.mark.anyio


async def test_the_first_answer_counts() -> None:
    port = open_port()
    assert port.waiting
    port.answer(1)
    port.answer(2)
    assert await port.wait() == 1
    assert not port.waiting


async def test_an_answer_from_another_thread_arrives() -> None:
    port = open_port()
    threading.Thread(target=port.answer, args=(7,)).start()
    assert await port.wait(20.0, lambda: "late") == 7


async def test_without_an_answer_the_deadline_answers() -> None:
    port = open_port()
    with anyio.fail_after(30):
        assert await port.wait(0.01, lambda: "late") == "late"
    assert not port.waiting
    port.answer("even later")


async def test_a_cancelled_waiter_waits_no_more() -> None:
    port = open_port()
    async with anyio.create_task_group() as group:
        group.start_soon(port.wait)
        await anyio.wait_all_tasks_blocked()
        assert port.waiting
        group.cancel_scope.cancel()
    assert not port.waiting
    port.answer(1)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_answered_port_leaves_no_deadline_behind(anyio_backend: str) -> None:
    deadlines = Deadlines(asyncio.get_running_loop())
    port = open_port()
    bucket = deadlines.watch(port, 100.0, lambda: "late")
    assert port in bucket
    other = open_port()
    other.answer(1)
    assert await other.wait(100.0, lambda: "late") == 1
    assert other not in bucket


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_deadlines_share_timers(anyio_backend: str) -> None:
    loop = asyncio.get_running_loop()
    timers: list[float] = []

    class Loop:
        time = staticmethod(lambda: 5.0)

        def call_at(self, when: float, *rest: Any) -> None:
            timers.append(when)

    deadlines = Deadlines(Loop())  # type: ignore[arg-type]
    for number in range(1000):
        deadlines.watch(open_port(), 1.0 + number / TICKS / 1000, lambda: None)
    assert len(timers) <= 2
    assert all(6.0 <= when <= 6.0 + 2 / TICKS + 1e-9 for when in timers)
    assert loop.is_running()


def test_an_answer_to_a_loop_that_is_gone_is_dropped() -> None:
    async def ask() -> Any:
        return open_port()

    port = asyncio.run(ask())
    port.answer(1)


def test_an_answer_to_a_trio_run_that_is_over_is_dropped() -> None:
    async def ask() -> Any:
        return open_port()

    port = anyio.run(ask, backend="trio")
    port.answer(1)


def test_a_thread_waits_for_its_answer_or_its_deadline() -> None:
    port = ThreadPort()
    threading.Thread(target=port.answer, args=(3,)).start()
    assert port.wait(20.0, lambda: "late") == 3
    assert not port.waiting
    late = ThreadPort()
    assert late.wait(0.01, lambda: "late") == "late"
    late.answer(4)
    assert not late.waiting


@pytest.mark.parametrize("answered_first", [True, False])
def test_a_deferred_reply_may_come_before_or_after_its_port(answered_first: bool) -> None:
    told: list[DeferredReply] = []
    deferred = DeferredReply(told.append)
    port = ThreadPort()
    assert deferred.waiting
    steps: list[Callable[[], None]] = [lambda: deferred.answer(Pong("a")), lambda: deferred.attach(port)]
    for step in steps if answered_first else reversed(steps):
        step()
    deferred.answer(Missing())
    assert port.wait(0.1, lambda: "late") == Pong("a")
    assert told == [deferred]
    assert not deferred.waiting


def test_a_deferred_reply_is_given_once_however_the_threads_race() -> None:
    for _ in range(200):
        deferred, port = DeferredReply(), ThreadPort()
        threads = [
            threading.Thread(target=deferred.attach, args=(port,)),
            *(threading.Thread(target=deferred.answer, args=(Pong(str(number)),)) for number in range(2)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert isinstance(port.wait(1.0, lambda: "late"), Pong)
        assert not port.waiting


async def test_a_deferred_reply_whose_caller_has_gone_is_waited_for_no_more() -> None:
    deferred, port = DeferredReply(), open_port()
    deferred.attach(port)
    assert deferred.waiting
    assert await port.wait(0.001, lambda: "late") == "late"
    assert not deferred.waiting
