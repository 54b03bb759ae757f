"""Support for callers without an event loop: a background loop, and synchronous versions of asynchronous classes."""

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
    """Value that a forked child creates again, because none of its threads would release the parent's."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self.renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        """Replace the value by a new one."""
        self.value = self._make()


class Background:
    """An asyncio event loop in a daemon thread, started on first use.

    The thread is never joined, so the interpreter exits immediately even if caches were left open.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: int | None = None

    def run(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine function on the loop and block until it returns.

        Raises `CacheError` on the loop's own thread, where the call would deadlock.
        """
        if threading.get_ident() == self._thread:
            raise CacheError(
                "a blocking call would block the event loop that it waits for, because a coroutine on that"
                " loop made it, such as a loader; await an asynchronous cache, or make the loader a plain function"
            )
        loop = self._running()
        # In an empty context: with that of a caller on trio, anyio would mistake this loop for trio's.
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
    """An asynchronous context manager that stays open in a task of the background loop."""

    def __init__(self, manager: AbstractAsyncContextManager[Any]) -> None:
        self._manager = manager
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Enter the context manager. Raises what entering it raises."""
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(opened))
        await opened

    async def close(self) -> None:
        """Exit the context manager and wait until that is done."""
        self._closing.set()
        if self._task is not None:
            await self._task

    async def _run(self, opened: asyncio.Future[None]) -> None:
        try:
            async with self._manager:
                opened.set_result(None)
                await self._closing.wait()
        except Exception as error:
            if opened.done():
                raise
            opened.set_exception(error)
        except BaseException:
            opened.cancel()  # Otherwise the caller of `open` would wait forever.
            raise


def _serve(ready: queue.SimpleQueue[asyncio.AbstractEventLoop]) -> None:
    loop = asyncio.new_event_loop()
    loop.call_soon(ready.put, loop)
    with contextlib.suppress(RuntimeError):  # Interpreter shutdown may close the loop's pipes while it runs.
        loop.run_forever()


BACKGROUND = PerProcess(Background)


def run(coroutine: Coroutine[Any, Any, R]) -> R:
    """Return the result of a coroutine that never suspends, such as those on a blocking client."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: R = stop.value
        return result
    coroutine.close()
    raise RuntimeError("a coroutine of the synchronous cache suspended, which it must never do")


def mirrored(method: Callable[Concatenate[Any, P], T], convert: Callable[[T], R]) -> Callable[Concatenate[Any, P], R]:
    """Return a method of a synchronous class that calls `method` on `self._inner` and converts the result."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return convert(method(self._inner, *args, **kwargs))

    return call


def blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Any, P], R]:
    """Return a method of a synchronous class that runs a non-suspending coroutine method of `self._inner`."""
    return mirrored(method, run)
