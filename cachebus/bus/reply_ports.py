"""Reply ports: each one receives the reply to one request. There is one kind for asyncio tasks, trio tasks and threads.

A port may be answered from any thread. The first reply counts and later ones are dropped, because a reply and its
deadline may arrive at the same time.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from asyncio import Future
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from threading import get_ident
from typing import Any, Protocol

import anyio

from cachebus.messages import CacheTimeoutError, Failed, Reply

from .clock import Deadlines, running_deadlines
from .compat import running_loop


class ReplyPort(Protocol):
    """The receiver of one reply."""

    def answer(self, reply: Any) -> None:
        """Deliver the reply. Does not wait. May be called from any thread; only the first call counts."""

    @property
    def waiting(self) -> bool:
        """True if the caller still waits; `False` once it was answered, timed out or was cancelled."""
        ...


class AsyncioPort:
    """A port on which an asyncio task waits. It costs a bare future and an entry in a shared timer."""

    __slots__ = ("_deadlines", "_thread", "future", "pending")

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._thread = deadlines.thread
        self.pending: DeferredReply | None = None
        self.future: Future[Any] = Future(loop=deadlines.loop)  # Takes half the time of loop.create_future().

    @property
    def waiting(self) -> bool:
        return not self.future.done()

    def __await__(self) -> Generator[Any, None, Any]:
        return self.future.__await__()

    def answer(self, reply: Any) -> None:
        try:
            # Compare threads, because `get_running_loop` makes a system call in Python 3.11.
            if get_ident() == self._thread:
                if not self.future.done():  # `_settle`, inlined.
                    self.future.set_result(reply)
            else:
                self._deadlines.loop.call_soon_threadsafe(self._settle, reply)
        except RuntimeError:
            pass  # The loop is closed, so no caller waits.

    def _settle(self, reply: Any) -> None:
        if not self.future.done():
            self.future.set_result(reply)

    async def wait(self, timeout: float | None = None, late: Callable[[], Any] = lambda: None) -> Any:
        """Wait for the answer; after `timeout` seconds the answer is `late()`."""
        bucket = None if timeout is None else self._deadlines.watch(self, timeout, late)
        try:
            return await self.future
        finally:
            if bucket is not None:
                bucket.pop(self, None)
            if self.pending is not None:
                self.pending.drop()


class TrioPort:
    """A port on which a trio task waits."""

    __slots__ = ("_event", "_reply", "_token", "pending")

    def __init__(self) -> None:
        # trio is not a dependency, but it is installed if its event loop is running.
        import trio

        self._token = trio.lowlevel.current_trio_token()
        self._event = trio.Event()
        self.pending: DeferredReply | None = None
        self._reply: Any = None

    @property
    def waiting(self) -> bool:
        return not self._event.is_set()

    def answer(self, reply: Any) -> None:
        import trio

        try:
            here = trio.lowlevel.current_trio_token() is self._token
        except RuntimeError:
            here = False
        if here:
            self._settle(reply)  # Takes a quarter of the time of `run_sync_soon`.
            return
        with contextlib.suppress(trio.RunFinishedError):  # The run has ended, so no caller waits.
            self._token.run_sync_soon(self._settle, reply)

    def _settle(self, reply: Any) -> None:
        if not self._event.is_set():
            self._reply = reply
            self._event.set()

    async def wait(self, timeout: float | None = None, late: Callable[[], Any] = lambda: None) -> Any:
        """Wait for the answer; after `timeout` seconds the answer is `late()`."""
        answered = False
        try:
            if timeout is None:
                await self._event.wait()
            else:
                with anyio.move_on_after(timeout):
                    await self._event.wait()
            answered = self._event.is_set()
        finally:
            self._event.set()  # Timed out or cancelled: the caller no longer waits.
            if self.pending is not None:
                self.pending.drop()
        return self._reply if answered else late()


class ThreadPort:
    """A port on which a thread waits, without an event loop."""

    __slots__ = ("_answers", "_open", "pending")

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._open = True
        self.pending: DeferredReply | None = None

    @property
    def waiting(self) -> bool:
        return self._open

    def answer(self, reply: Any) -> None:
        if self._open:
            self._answers.put(reply)

    def wait(self, timeout: float | None = None, late: Callable[[], Any] = lambda: None) -> Any:
        """Wait for the answer; after `timeout` seconds the answer is `late()`."""
        try:
            return self._answers.get(timeout=None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
        except queue.Empty:
            return late()
        finally:
            self._open = False
            if self.pending is not None:
                self.pending.drop()


TaskPort = AsyncioPort | TrioPort
"""A port on which a task waits."""


class DeferredReply:
    """A reply that an actor gives later. Its handler returns the deferred reply, and the turn ends.

    The actor calls `answer` when the reply is known; the bus attaches the caller's port. Either may come first. The
    deferred reply of a batch is answered with a sequence of replies. `on_answer` is called when the reply is given or
    the caller no longer waits.
    """

    __slots__ = ("_port", "_replies", "on_answer")

    def __init__(self, on_answer: Callable[[DeferredReply], None] | None = None) -> None:
        # No lock, because an interruption could leave it locked. The second one of `answer` and `attach` sees the state
        # that the first has set. If both deliver the reply, the port ignores the second.
        self._replies: list[Reply | Sequence[Reply]] = []
        self._port: ReplyPort | None = None
        self.on_answer = on_answer

    @property
    def waiting(self) -> bool:
        """True if a caller may still wait for the reply."""
        return not self._replies and (self._port is None or self._port.waiting)

    def answer(self, reply: Reply | Sequence[Reply]) -> None:
        """Deliver the reply. May be called from any thread; only the first call counts."""
        if self._replies:
            return
        self._replies.append(reply)
        if self._replies[0] is reply:
            self.hand_over()

    def hand_over(self) -> None:
        """Pass the reply, if there is one, to the port. Called again after an interruption."""
        if self._replies:
            if (port := self._port) is not None:
                port.answer(self._replies[0])
            if self.on_answer is not None:
                self.on_answer(self)

    def attach(self, port: ReplyPort) -> None:
        """Set the port that receives the reply."""
        self._port = port
        if self._replies:
            port.answer(self._replies[0])
        elif isinstance(port, AsyncioPort | TrioPort | ThreadPort):
            port.pending = self

    def drop(self) -> None:
        """Record that the caller no longer waits."""
        if not self._replies and self.on_answer is not None:
            self.on_answer(self)


def open_port() -> TaskPort:
    """Return a port on which the running task can wait."""
    deadlines = running_deadlines()
    return TrioPort() if deadlines is None else AsyncioPort(deadlines)


def in_event_loop() -> bool:
    """True if this thread runs an event loop, which a blocking call would block."""
    if running_loop() is not None:
        return True
    if (trio := sys.modules.get("trio")) is None:
        return False
    try:
        trio.lowlevel.current_trio_token()
    except RuntimeError:
        return False
    return True


@lru_cache(maxsize=256)
def too_late(address: str, timeout: float) -> Callable[[], Failed]:
    """Return a function that builds the reply for a timeout: `address` has not answered within `timeout` seconds."""
    return lambda: Failed.of(CacheTimeoutError("no answer", address, timeout))
