"""Loaders for tests."""

from __future__ import annotations

import anyio


class Loader:
    """Loader that counts its calls, and holds each until it is released."""

    def __init__(self) -> None:
        self.calls = 0
        self.begun = anyio.Event()
        self.go_on = anyio.Event()

    async def __call__(self, key: str) -> str:
        self.calls += 1
        self.begun.set()
        await self.go_on.wait()
        return f"{key} {self.calls}"
