"""Runners: execute loads as tasks of an event loop or in threads. The loading code is written once for both."""

from __future__ import annotations

import contextvars
import inspect
import threading
import time
from asyncio import CancelledError, current_task
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol

import anyio
import anyio.to_thread
from anyio.lowlevel import checkpoint

from cachebus.bus import running_loop
from cachebus.bus.spawn import spawn
from cachebus.client.backend_client import BackendClient
from cachebus.client.background_loop import BACKGROUND, PerProcess, run
from cachebus.messages import CacheError, Failed, LoadFailed, LoadStarted, LoadSucceeded, Request

from .loaders import awaited
from .singleflight import CURRENT_LOADS, InFlightLoad

MAX_THREADS = 64
"""Maximum number of threads for background loads of synchronous caches. Further loads run in the caller's thread."""


class Work(Protocol):
    """Protocol of the work that a runner starts. `end` is called after `run`, in every case, and is idempotent."""

    @property
    def in_flight(self) -> InFlightLoad: ...

    def run(self) -> Coroutine[Any, Any, None]: ...

    def end(self) -> None: ...


class AsyncRunner:
    """Runner that executes loads as tasks of asyncio or trio.

    `ask`, `wait_reply` and `request_unguarded` are `request`, `wait_reply` and `request_unguarded` of the client.
    `wait` is `InFlightLoad.wait`.
    """

    blocks = False
    wait = staticmethod(InFlightLoad.wait)

    def __init__(self, client: BackendClient) -> None:
        self.client = client
        self.ask: Any = client.request
        self.wait_reply: Any = client.wait_reply
        self.request_unguarded: Any = client.request_unguarded

    async def ask_all(self, requests: Sequence[Request[Any]]) -> Sequence[Any]:
        """Send several requests concurrently and return their replies. A failed request has the reply `Failed`."""
        replies: list[Any] = [None] * len(requests)

        async def ask(at: int) -> None:
            try:
                replies[at] = await self.client.request(requests[at])
            except CacheError as error:
                replies[at] = Failed.of(error)

        async with anyio.create_task_group() as tasks:
            for at in range(len(requests)):
                tasks.start_soon(ask, at)
        return replies

    async def call(self, loader: Callable[..., Any], arguments: tuple[Any, ...], *, asynchronous: bool) -> Any:
        """Call a loader, and await its result if it is awaitable."""
        try:
            if asynchronous:
                result = await loader(*arguments)
                return await awaited(result) if isinstance(result, Awaitable) else result
            return await awaited(await _in_worker_thread(partial(loader, *arguments)))
        except CancelledError:
            task = current_task() if running_loop() is not None else None
            if task is not None and not task.cancelling():
                # Nothing cancelled this task. If this counted as a cancelled load, all waiters would load again, one by
                # one.
                raise CacheError("the loader was cancelled by something that it awaits") from None
            raise

    def cancels(self, error: BaseException) -> bool:
        """Return True if an error cancels the task of the load, rather than being an error of the loader."""
        return isinstance(error, (GeneratorExit, anyio.get_cancelled_exc_class()))

    async def pause(self, seconds: float) -> None:
        """Sleep on the clock of the bus."""
        clock = self.client.bus.clock
        await clock.sleep_until(clock.monotonic() + seconds)

    async def let_others_run(self) -> None:
        """Yield to the tasks that are ready to run."""
        await checkpoint()

    def start(self, work: Work, *, background: bool) -> None:
        """Start work in a new task, whether or not it is `background` work."""
        in_flight = work.in_flight
        in_flight.owner = running = work.run()
        in_flight.cancel = spawn(running, unbegun=work.end)


async def _in_worker_thread(function: Callable[[], Any]) -> Any:
    """Call a plain loader in a worker thread. Its result may be a coroutine, as with `lambda: load(1)`."""
    results: list[Any] = []
    abandoned = False

    def call() -> None:
        results.append(function())
        if abandoned:
            _close(results)

    try:
        await anyio.to_thread.run_sync(call, abandon_on_cancel=True)
    except BaseException:
        # The thread continues, but nothing will await its result.
        abandoned = True
        _close(results)
        raise
    return results[0]


def _close(results: list[Any]) -> None:
    for each in results:
        if inspect.iscoroutine(each) and inspect.getcoroutinestate(each) == inspect.CORO_CREATED:
            each.close()


class ThreadRunner:
    """Runner that executes loads in the caller's thread, or in a new thread if they are background work.

    The methods are those of `AsyncRunner`, but the coroutines never suspend. Work that is not background work is
    finished when `start` returns.
    """

    blocks = True
    wait = staticmethod(partial(InFlightLoad.wait, blocking=True))

    def __init__(self, client: BackendClient) -> None:
        self.client = client
        self.ask: Any = partial(client.request, blocking=True)
        self.wait_reply: Any = partial(client.wait_reply, blocking=True)
        self.request_unguarded: Any = partial(client.request_unguarded, blocking=True)

    async def ask_all(self, requests: Sequence[Request[Any]]) -> Sequence[Any]:
        replies: list[Any] = []
        for request in requests:
            try:
                replies.append(await self.ask(request))
            except CacheError as error:
                replies.append(Failed.of(error))
        return replies

    async def call(self, loader: Callable[..., Any], arguments: tuple[Any, ...], *, asynchronous: bool) -> Any:
        result = loader(*arguments)
        if not hasattr(result, "__await__"):
            return result
        loads = CURRENT_LOADS.get()

        async def in_background() -> Any:
            CURRENT_LOADS.set(loads)  # The task on the background loop has another context.
            return await awaited(result)

        try:
            return BACKGROUND.value.run(in_background)
        finally:
            _close([result])  # Only if it never started.

    def cancels(self, error: BaseException) -> bool:
        return False

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 (this coroutine runs in a thread that may block, and never suspends)

    async def let_others_run(self) -> None:
        """Do nothing, because other threads run anyway."""

    def start(self, work: Work, *, background: bool) -> None:
        # Set before the thread starts. Until then the caller is the owner, and it may end soon.
        work.in_flight.owner = running = work.run()
        free = _threads.value
        if not background or not free.acquire(blocking=False):
            _run(running, work)
            return

        def in_thread() -> None:
            work.in_flight.thread = threading.get_ident()
            try:
                _run(running, work)
            finally:
                free.release()

        # A daemon thread, so that a loader that never returns does not keep the interpreter from exiting.
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(in_thread,), name="cachebus-load", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # The thread limit of the system is reached, or the interpreter is shutting down.
            free.release()
            _run(running, work)


def _run(running: Coroutine[Any, Any, None], work: Work) -> None:
    try:
        run(running)
    finally:
        work.end()


Runner = AsyncRunner | ThreadRunner
"""Runner of an asynchronous or a synchronous caller."""


async def call_loader(
    runner: Runner,
    in_flight: InFlightLoad,
    keys: tuple[str, ...],
    loader: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    asynchronous: bool,
) -> tuple[Any, float]:
    """Call a loader and emit the events of the load. Returns the result and the duration in seconds."""
    emitter, now = runner.client.emitter, runner.client.bus.clock.monotonic
    started = now()
    if LoadStarted in emitter.subscriptions.kinds:
        for key in keys:
            emitter.emit(LoadStarted, key=key)
    token = CURRENT_LOADS.set((*CURRENT_LOADS.get(), in_flight))
    try:
        loaded = await runner.call(loader, arguments, asynchronous=asynchronous)
    except BaseException as error:
        if LoadFailed in emitter.subscriptions.kinds:
            for key in keys:
                emitter.emit(LoadFailed, key=key, error=type(error).__name__, duration=now() - started)
        raise
    finally:
        CURRENT_LOADS.reset(token)
    duration = now() - started
    if LoadSucceeded in emitter.subscriptions.kinds:
        for key in keys:
            emitter.emit(LoadSucceeded, key=key, duration=duration)
    return loaded, duration


_threads = PerProcess(lambda: threading.BoundedSemaphore(MAX_THREADS))
"""Semaphore of the background threads. A forked child starts with a new one."""
