"""Two ways to wait: as a task of an event loop, and as a thread. What loads is written once, over either."""

from __future__ import annotations

import contextvars
import inspect
import os
import threading
import time
from asyncio import CancelledError, _get_running_loop, current_task
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import checkpoint

from cachebus.bus.tasks import spawn
from cachebus.messages import CacheError, Failed, Request

from .background import BACKGROUND
from .flight import Flight, OnBehalfOf, loads_of_this_context
from .link import Link, run
from .loaders import awaited

R = TypeVar("R")
Work = Callable[["Way"], Coroutine[Any, Any, None]]

MAX_THREADS = 64
"""Threads that plain loaders of synchronous caches run in at most, where they may have to go on by themselves. Beyond
that, they run in the thread of whoever asks."""


class Way(Protocol):
    """How whoever asks waits. One that `blocks` has done the work of a flight when `beside` returns, unless it is `alone`."""

    blocks: bool
    link: Link

    async def ask(self, request: Request[R], patience: float = 0.0) -> R:
        """Ask the backend, up to `patience` seconds longer than a call may take."""
        ...

    async def finish(self, request: Request[R], reply: Any) -> R:
        """Come to the reply from what a turn has returned."""
        ...

    async def probe(self, request: Request[R], patience: float) -> R:
        """As `ask`, for the error as it is, which counts nowhere."""
        ...

    async def ask_all(self, requests: Sequence[Request[Any]]) -> Sequence[Any]:
        """Ask the backend several things at once. What fails is a `Failed` among the replies."""
        ...

    def wait(
        self, flight: Flight, timeout: float | None, *, keep: bool = False, begin: Callable[[], None] | None = None
    ) -> Coroutine[Any, Any, Any]:
        """As `Flight.wait`."""
        ...

    async def call(self, function: Callable[..., Any], argument: Any, *, asynchronous: bool) -> Any:
        """Call `function`, which calls a loader, and await what it returns if that is to be awaited."""

    def cancels(self, error: BaseException) -> bool:
        """Whether that ends whoever does the work of a flight, and is not just what a loader raised."""
        ...

    async def pause(self, seconds: float) -> None:
        """Let time pass."""

    async def gather(self) -> None:
        """Let those come who are about to come by themselves."""

    def beside(self, flight: Flight, work: Work, ended: Callable[[], None], *, alone: bool) -> None:
        """Do the work of a flight. `alone`, whoever asks does not wait for it."""


class Awaiting:
    """As a task of asyncio or trio."""

    blocks = False

    def __init__(self, link: Link) -> None:
        self.link = link
        self.ask: Any = link.request
        self.finish: Any = link.finish

    async def probe(self, request: Request[R], patience: float) -> R:
        return await self.link.probe(request, self.link.timeout + patience)

    async def ask_all(self, requests: Sequence[Request[Any]]) -> Sequence[Any]:
        replies: list[Any] = [None] * len(requests)

        async def ask(at: int) -> None:
            try:
                replies[at] = await self.link.request(requests[at])
            except CacheError as error:
                replies[at] = Failed.of(error)

        async with anyio.create_task_group() as tasks:
            for at in range(len(requests)):
                tasks.start_soon(ask, at)
        return replies

    def wait(
        self, flight: Flight, timeout: float | None, *, keep: bool = False, begin: Callable[[], None] | None = None
    ) -> Coroutine[Any, Any, Any]:
        return flight.wait(timeout, keep=keep, begin=begin)

    async def call(self, function: Callable[..., Any], argument: Any, *, asynchronous: bool) -> Any:
        try:
            if asynchronous:
                result = await function(argument)
                return await awaited(result) if isinstance(result, Awaitable) else result
            return await awaited(await _in_worker_thread(lambda: function(argument)))
        except CancelledError:
            task = current_task() if _get_running_loop() is not None else None
            if task is not None and not task.cancelling():
                # Nobody wants this task to end: as an outcome, everybody who waits would load again, one by one.
                raise CacheError("the loader was cancelled by something that it awaits") from None
            raise

    def cancels(self, error: BaseException) -> bool:
        return isinstance(error, (GeneratorExit, anyio.get_cancelled_exc_class()))

    async def pause(self, seconds: float) -> None:
        clock = self.link.bus.clock
        await clock.sleep_until(clock.monotonic() + seconds)

    async def gather(self) -> None:
        await checkpoint()

    def beside(self, flight: Flight, work: Work, ended: Callable[[], None], *, alone: bool) -> None:
        flight.cancel = spawn(lambda: work(self), ended)


async def _in_worker_thread(function: Callable[[], Any]) -> Any:
    """What a plain loader returns, which may be a coroutine: of `lambda: load(1)`, say."""
    results: list[Any] = []
    gone = False

    def call() -> None:
        results.append(function())
        if gone:
            _close(results)

    try:
        await anyio.to_thread.run_sync(call, abandon_on_cancel=True)
    except BaseException:
        # The thread goes on by itself, and nobody will await what it brings.
        gone = True
        _close(results)
        raise
    return results[0]


def _close(results: list[Any]) -> None:
    for each in results:
        if inspect.iscoroutine(each) and inspect.getcoroutinestate(each) == inspect.CORO_CREATED:
            each.close()


class Blocking:
    """As a thread."""

    blocks = True

    def __init__(self, link: Link) -> None:
        self.link = link
        self.ask: Any = link.request_blocking
        self.finish: Any = link.finish_blocking

    async def probe(self, request: Request[R], patience: float) -> R:
        return await self.link.probe_blocking(request, self.link.timeout + patience)

    async def ask_all(self, requests: Sequence[Request[Any]]) -> Sequence[Any]:
        replies: list[Any] = []
        for request in requests:
            try:
                replies.append(await self.link.request_blocking(request))
            except CacheError as error:
                replies.append(Failed.of(error))
        return replies

    async def wait(
        self, flight: Flight, timeout: float | None, *, keep: bool = False, begin: Callable[[], None] | None = None
    ) -> Any:
        return flight.wait_in_thread(timeout, keep=keep, begin=begin)

    async def call(self, function: Callable[..., Any], argument: Any, *, asynchronous: bool) -> Any:
        result = function(argument)
        if not hasattr(result, "__await__"):
            return result
        loads = loads_of_this_context()

        async def in_background() -> Any:
            with OnBehalfOf(loads):
                return await awaited(result)

        try:
            return BACKGROUND.run(in_background)
        finally:
            _close([result])  # Had it not been begun.

    def cancels(self, error: BaseException) -> bool:
        return False

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 (this coroutine runs in a thread that may block, and never suspends)

    async def gather(self) -> None:
        """Nobody: threads come when they like."""

    def beside(self, flight: Flight, work: Work, ended: Callable[[], None], *, alone: bool) -> None:
        free = _threads.free
        if not alone or not free.acquire(blocking=False):
            _work(self, work, ended)
            return

        def in_thread() -> None:
            flight.thread = threading.get_ident()
            try:
                _work(self, work, ended)
            finally:
                free.release()

        # A daemon, so that a loader which never returns does not keep the interpreter from ending.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(in_thread,), name="cachebus-load", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # There can be no more threads, or the interpreter is ending.
            free.release()
            _work(self, work, ended)


def _work(way: Blocking, work: Work, ended: Callable[[], None]) -> None:
    try:
        run(work(way))
    finally:
        ended()


class _Threads:
    """The threads that may still be begun. A child of a fork has none of its parent's, and begins with all."""

    def __init__(self) -> None:
        self.forked()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forked)

    def forked(self) -> None:
        """Begin anew."""
        self.free = threading.BoundedSemaphore(MAX_THREADS)


_threads = _Threads()
