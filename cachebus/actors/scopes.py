"""Breaking off an `await` from outside, cheaply."""

from __future__ import annotations

from asyncio import CancelledError, Task, current_task
from types import TracebackType
from typing import Any, Self

import anyio

from cachebus.bus import running_loop


class AsyncioScope:
    """As `anyio.CancelScope`, for one `await` of code that is asyncio's own: 0.5 us instead of 6.

    It cancels the task, as `asyncio.timeout` does, which a shielded scope of anyio's inside would not withstand.
    """

    __slots__ = ("_before", "_task", "cancel_called", "cancelled_caught")

    def __init__(self, task: Task[Any]) -> None:
        self._task = task
        self._before = task.cancelling()
        self.cancel_called = False
        self.cancelled_caught = False

    def cancel(self) -> None:
        """Break off what is being awaited. To be called from another task."""
        if not self.cancel_called:
            self.cancel_called = True
            self._task.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> bool:
        if not self.cancel_called:
            return False
        # Somebody else may want the task to end as well, and their cancellation is not ours to swallow.
        ours = self._task.uncancel() <= self._before
        self.cancelled_caught = ours and kind is not None and issubclass(kind, CancelledError)
        return self.cancelled_caught


def asyncio_scope() -> AsyncioScope | anyio.CancelScope:
    """A scope around code that is asyncio's own where asyncio runs."""
    if running_loop() is not None and (task := current_task()) is not None:
        return AsyncioScope(task)
    return anyio.CancelScope()
