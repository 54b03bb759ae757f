"""Work beside whoever starts it, in the event loop that is running, on asyncio and on trio."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from asyncio import _get_running_loop
from collections.abc import Callable, Coroutine
from typing import Any

_running: set[asyncio.Task[None]] = set()  # A loop holds its tasks weakly.


def spawn(function: Callable[[], Coroutine[Any, Any, None]], ended: Callable[[], None]) -> Callable[[], None]:
    """Run `function` beside the present task, in a copy of its context, and return a function that cancels it from any
    thread.

    `function` must not raise. `ended` is called once, whatever happens: also when it is cancelled before its first step,
    and when the event loop ends first.
    """
    loop = _get_running_loop()
    if loop is None:
        return _spawn_in_trio(function, ended)
    task = loop.create_task(function())
    _running.add(task)

    def done(task: asyncio.Task[None]) -> None:
        _running.discard(task)
        ended()

    task.add_done_callback(done)

    def cancel() -> None:
        if _get_running_loop() is loop:
            task.cancel()
            return
        with contextlib.suppress(RuntimeError):  # The loop is closed, and the task with it.
            loop.call_soon_threadsafe(task.cancel)

    return cancel


def _spawn_in_trio(function: Callable[[], Coroutine[Any, Any, None]], ended: Callable[[], None]) -> Callable[[], None]:
    import trio

    scope = trio.CancelScope()

    async def run() -> None:
        try:
            with scope:
                await function()
        finally:
            ended()

    # A system task: no nursery here is sure to outlive whoever asks, which is the point.
    token = trio.lowlevel.current_trio_token()
    trio.lowlevel.spawn_system_task(run, context=contextvars.copy_context())

    def cancel() -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(scope.cancel)

    return cancel
