"""Loader that waits for an event."""

from __future__ import annotations

from typing import Any

import anyio


class Slow:
    """Loader that sets `begun`, waits for `go_on`, and returns `value`, or raises it if it is an exception."""

    def __init__(self, value: Any = "value") -> None:
        self.value = value
        self.begun, self.go_on = anyio.Event(), anyio.Event()
        self.calls = 0

    async def __call__(self) -> Any:
        self.calls += 1
        self.begun.set()
        await self.go_on.wait()
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value
