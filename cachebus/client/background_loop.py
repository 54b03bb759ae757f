"""For callers without an event loop: one in the background, and synchronous doubles of asynchronous classes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import os
import queue
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from cachebus.messages import CacheError

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class PerProcess(Generic[T]):
    """Something that the child of a fork makes again, because no thread of the child would release or give back the old one."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """Make it again."""
        self.value = self._make()


class Background:
    """An asyncio loop in a daemon thread, started when first needed.

    The thread is never joined, so that an interpreter exits at once, whatever was left open.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: int | None = None

    def run(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function in the loop and block for its result. Raises `CacheError` on the loop's own thread, which
        would wait for itself."""
        if threading.get_ident() == self._thread:
            raise CacheError(
                "a blocking call would stop the event loop that it waits for, because it was made by a coroutine there,"
                " such as a loader; await an asynchronous cache, or let the loader be a plain function"
            )
        loop = self._running()
        # In a context of its own: that of a caller under trio would make anyio take this loop for trio's.
        return contextvars.Context().run(asyncio.run_coroutine_threadsafe, function(), loop).result()

    def _running(self) -> asyncio.AbstractEventLoop:
        with self._guard:
            if self._loop is None:
                ready: queue.SimpleQueue[asyncio.AbstractEventLoop] = queue.SimpleQueue()
                thread = threading.Thread(target=_serve, args=(ready,), name="cachebus", daemon=True)
                thread.start()
                self._loop, self._thread = ready.get(), thread.ident
            return self._loop


class Hosted:
    """An asynchronous context manager that is open in the background loop, in a task of its own."""

    def __init__(self, manager: AbstractAsyncContextManager[Any]) -> None:
        self._manager = manager
        self._leave = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Enter it. Raises the error that entering raises."""
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(opened))
        await opened

    async def close(self) -> None:
        """Leave it, and wait until that is done."""
        self._leave.set()
        if self._task is not None:
            await self._task

    async def _live(self, opened: asyncio.Future[None]) -> None:
        try:
            async with self._manager:
                opened.set_result(None)
                await self._leave.wait()
        except Exception as error:
            if opened.done():
                raise
            opened.set_exception(error)
        except BaseException:
            opened.cancel()  # The caller of `open` would wait for ever.
            raise


def _serve(ready: queue.SimpleQueue[asyncio.AbstractEventLoop]) -> None:
    loop = asyncio.new_event_loop()
    loop.call_soon(ready.put, loop)
    with contextlib.suppress(RuntimeError):  # Interpreter shutdown may take the loop's pipes away under it.
        loop.run_forever()


BACKGROUND = PerProcess(Background)


def run(coroutine: Coroutine[Any, Any, R]) -> R:
    """Return the result of a coroutine that never suspends, such as those over a blocking link."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: R = stop.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine of the synchronous cache has suspended")


def mirrored(method: Callable[Concatenate[Any, P], T], convert: Callable[[T], R]) -> Callable[Concatenate[Any, P], R]:
    """Return the method of a synchronous double: it calls a method of `self._inner`, and converts what that returns."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return convert(method(self._inner, *args, **kwargs))

    return call


def blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Any, P], R]:
    """Return the method of a synchronous double: it runs a coroutine method of `self._inner`, which never suspends."""
    return mirrored(method, run)
