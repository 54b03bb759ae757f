"""Background work in the running event loop, on asyncio and on trio."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from .clock import running_deadlines
from .compat import enter_task, leave_task, running_loop

_running: set[asyncio.Task[None]] = set()  # A loop holds its tasks weakly.

Ended = Callable[[], None]


def spawn(
    work: Coroutine[Any, Any, None], ended: Ended | None = None, *, unbegun: Ended | None = None
) -> Callable[[], None]:
    """Run `work` beside the current task, in a copy of its context, and return a function that cancels it from any thread.

    `work` must not raise. `ended` is called once in any case, also if `work` is cancelled before its first step or the
    event loop ends first. `unbegun` is called if `work` does not begin, and perhaps in other cases. On asyncio the first
    step is taken at once, on this stack, so work that does not wait has ended when this returns.
    """
    deadlines = running_deadlines()  # It knows the loop; asking asyncio costs Python 3.11 a system call.
    if deadlines is None:
        return _spawn_in_trio(work, ended or unbegun or (lambda: None))
    loop = deadlines.loop
    if loop.get_task_factory() is None:
        begun = _Begun(work)
        context = contextvars.copy_context()
        task = loop.create_task(begun, context=context)
        context.run(begun.begin, loop, task)
        if begun.over:
            if ended is not None:
                ended()  # The task has one step left, which finds that nothing is left to do.
            return lambda: None
    else:
        # Tasks of this factory may begin at any time.
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
        with contextlib.suppress(RuntimeError):  # The loop is closed, and the task with it.
            loop.call_soon_threadsafe(task.cancel)

    return cancel


class _Begun(Coroutine[Any, Any, None]):
    """A coroutine whose task takes it over after its first step. That step is taken in the name of the task, so that
    what looks for the current task in it (a timeout, a task group, a cancel scope) finds the one that will go on.
    Python 3.12 can do this by itself (`eager_start`); 3.11 cannot."""

    __slots__ = ("_awaits", "_coroutine", "_error", "over")

    def __init__(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._coroutine = coroutine
        self._awaits: Any = None
        self._error: BaseException | None = None
        self.over = False

    def begin(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
        """Take the first step. What it raises is raised by the task."""
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
                return awaits  # Cancelled before its second step: what it waits for is cancelled, as for any task.
        return self._coroutine.throw(*error)

    def close(self) -> None:
        self._coroutine.close()

    def __await__(self) -> Generator[Any, None, None]:
        raise NotImplementedError("a task drives it")


def _spawn_in_trio(work: Coroutine[Any, Any, None], ended: Callable[[], None]) -> Callable[[], None]:
    import trio

    scope = trio.CancelScope()

    async def run() -> None:
        try:
            with scope:
                await work
        finally:
            ended()

    # A system task, because no nursery here is sure to outlive the caller.
    token = trio.lowlevel.current_trio_token()
    trio.lowlevel.spawn_system_task(run, context=contextvars.copy_context())

    def cancel() -> None:
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(scope.cancel)

    return cancel
