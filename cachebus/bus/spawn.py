"""Background tasks in the running event loop, on asyncio and on trio."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from .clock import running_deadlines
from .compat import enter_task, leave_task, running_loop

_running: set[asyncio.Task[None]] = set()  # Strong references, because an event loop only has weak ones.

Ended = Callable[[], None]


def spawn(
    work: Coroutine[Any, Any, None], ended: Ended | None = None, *, unbegun: Ended | None = None
) -> Callable[[], None]:
    """Run `work` in a new task, in a copy of the current context. Return a function that cancels it from any thread.

    `work` must not raise. `ended` is called exactly once, even if `work` is cancelled before its first step or the
    event loop ends first. `unbegun` is called if `work` does not begin; it may also be called in other cases. On
    asyncio, the first step runs immediately on this stack, so work that does not wait has ended when this function
    returns.
    """
    deadlines = running_deadlines()  # Knows the loop; `get_running_loop` makes a system call in Python 3.11.
    if deadlines is None:
        return _spawn_in_trio(work, ended or unbegun or (lambda: None))
    loop = deadlines.loop
    if loop.get_task_factory() is None:
        eager = _EagerStart(work)
        context = contextvars.copy_context()
        task = loop.create_task(eager, context=context)
        context.run(eager.begin, loop, task)
        if eager.over:
            if ended is not None:
                ended()  # The task has one step left, which does nothing.
            return lambda: None
    else:
        # A custom task factory decides when its tasks begin.
        task = loop.create_task(work)
        ended = ended or unbegun
    _running.add(task)
    task.add_done_callback(_running.discard)
    if ended is not None:
        end = ended
        task.add_done_callback(lambda _: end())

    def cancel() -> None:
        if running_loop() is loop:
            task.cancel()
            return
        with contextlib.suppress(RuntimeError):  # The loop is closed, so the task has ended.
            loop.call_soon_threadsafe(task.cancel)

    return cancel


class _EagerStart(Coroutine[Any, Any, None]):
    """A coroutine whose first step runs before its task does.

    During that step the task is the current one, so timeouts, task groups and cancel scopes are bound to the right
    task. Python 3.12 has `eager_start` for this; Python 3.11 does not.
    """

    __slots__ = ("_awaits", "_coroutine", "_error", "over")

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine
        self._awaits: Any = None
        self._error: BaseException | None = None
        self.over = False

    def begin(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
        """Run the first step. If it raises, the task raises the error."""
        present = asyncio.current_task(loop)
        if present is not None:
            leave_task(loop, present)
        enter_task(loop, task)
        try:
            self._awaits = self._coroutine.send(None)
        except StopIteration:
            self.over = True
        except BaseException as error:
            self._error = error
        finally:
            leave_task(loop, task)
            if present is not None:
                enter_task(loop, present)

    def send(self, value: Any) -> Any:
        if self.over:
            raise StopIteration
        if self._error is not None:
            raise self._error
        if self._awaits is not None:
            awaits, self._awaits = self._awaits, None
            return awaits
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        if self.over:
            raise StopIteration
        if self._awaits is not None:
            awaits, self._awaits = self._awaits, None
            if isinstance(error[0], asyncio.CancelledError) and awaits.cancel():
                return awaits  # Cancelled before its second step: cancel the awaited future, as for any task.
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, None, None]:
        raise NotImplementedError("this coroutine can only be run by a task")


def _spawn_in_trio(work: Coroutine[Any, Any, None], ended: Callable[[], None]) -> Callable[[], None]:
    import trio

    scope = trio.CancelScope()

    async def run() -> None:
        try:
            with scope:
                await work
        finally:
            ended()

    # A system task, because no nursery is guaranteed to outlive the caller.
    token = trio.lowlevel.current_trio_token()
    trio.lowlevel.spawn_system_task(run, context=contextvars.copy_context())

    def cancel() -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(scope.cancel)

    return cancel
