"""`spawn`: the first step runs at once, in the name of the task that continues the work."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from cachebus.bus.spawn import spawn

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="outside")


class Ends:
    """Callback that counts its calls, and can be awaited."""

    def __init__(self) -> None:
        self.times = 0
        self.event = asyncio.Event()

    def __call__(self) -> None:
        self.times += 1
        self.event.set()


def in_asyncio(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(run())


def test_what_does_not_wait_is_over_at_once() -> None:
    async def test() -> None:
        ended, done = Ends(), []

        async def work() -> None:
            done.append(asyncio.current_task())

        cancel = spawn(work(), ended)
        assert len(done) == ended.times == 1
        assert done[0] is not asyncio.current_task()
        cancel()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert ended.times == 1
        assert done[0] is not None
        assert done[0].done()
        assert not done[0].cancelled()

    in_asyncio(test)


def test_the_current_task_and_the_context_are_the_same_before_and_after_waiting() -> None:
    async def test() -> None:
        ended, tasks, values = Ends(), [], []

        async def work() -> None:
            variable.set("inside")
            # Each of these reads the current task when it begins, and again when it ends.
            async with asyncio.timeout(30), asyncio.TaskGroup() as group:
                with anyio.fail_after(30):
                    async with anyio.create_task_group() as other:
                        tasks.append(asyncio.current_task())
                        group.create_task(asyncio.sleep(0))
                        other.start_soon(anyio.sleep, 0)
                        await asyncio.sleep(0.001)
                        tasks.append(asyncio.current_task())
                        values.append(variable.get())

        me = asyncio.current_task()
        spawn(work(), ended)
        assert asyncio.current_task() is me
        assert variable.get() == "outside"
        await ended.event.wait()
        assert tasks[0] is tasks[1] is not me
        assert values == ["inside"]

    in_asyncio(test)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_it_can_be_cancelled_and_cleans_up(steps: int) -> None:
    async def test() -> None:
        ended, caught, never = Ends(), [], asyncio.get_running_loop().create_future()

        async def work() -> None:
            try:
                await never
            except asyncio.CancelledError as error:
                await asyncio.sleep(0)  # Waiting is still possible after a cancellation.
                caught.append(error)
                raise

        cancel = spawn(work(), ended)
        for _ in range(steps):
            await asyncio.sleep(0)
        cancel()
        await ended.event.wait()
        assert len(caught) == 1
        assert never.cancelled(), "the awaited future must be cancelled too"
        assert ended.times == 1

    in_asyncio(test)


def test_a_cancellation_that_is_swallowed_at_once_is_no_end() -> None:
    async def test() -> None:
        ended, went_on = Ends(), []

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                went_on.append("swallowed")
            await asyncio.sleep(0)
            went_on.append("and done")

        spawn(work(), ended)()
        await ended.event.wait()
        assert went_on == ["swallowed", "and done"]

    in_asyncio(test)


def test_the_end_of_the_loop_ends_it() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cleaned up")

    async def main() -> None:
        spawn(work(), lambda: ended.append("ended"))
        spawn(asyncio.sleep(0))

    asyncio.run(main())
    assert ended == ["cleaned up", "ended"]


def test_a_loop_with_tasks_of_another_kind_makes_its_own() -> None:
    class Mine(asyncio.Task[Any]):
        pass

    async def test() -> None:
        asyncio.get_running_loop().set_task_factory(lambda loop, coroutine, **more: Mine(coroutine, loop=loop, **more))
        ended, tasks = Ends(), []

        async def work() -> None:
            tasks.append(asyncio.current_task())

        spawn(work(), ended)
        await ended.event.wait()
        assert type(tasks[0]) is Mine

    in_asyncio(test)
