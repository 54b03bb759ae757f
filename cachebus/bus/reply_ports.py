"""Reply ports: where one answer goes, once. One kind for each way of waiting: a task of asyncio, of trio, a thread.

A port may be answered from any thread. The first answer counts and later ones are dropped, because an answer that
meets a deadline on its way is normal.
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
    """Where an answer goes."""

    def answer(self, reply: Any) -> None:
        """Give the answer. Does not wait, may be called from any thread, and only the first call counts."""

    @property
    def waiting(self) -> bool:
        """Whether somebody still waits; `False` once answered, timed out or cancelled."""
        ...


class AsyncioPort:
    """A port on which a task of an asyncio loop waits. Cheap: a bare future, and a place in a shared timer."""

    __slots__ = ("_deadlines", "_thread", "future", "pending")

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._thread = deadlines.thread
        self.pending: DeferredReply | None = None
        self.future: Future[Any] = Future(loop=deadlines.loop)  # Half the time of loop.create_future().

    @property
    def waiting(self) -> bool:
        return not self.future.done()

    def __await__(self) -> Generator[Any, None, Any]:
        return self.future.__await__()

    def answer(self, reply: Any) -> None:
        try:
            # By the thread, because asking for the running loop costs Python 3.11 a system call.
            if get_ident() == self._thread:
                if not self.future.done():  # As `_settle`, less a call for each answer.
                    self.future.set_result(reply)
            else:
                self._deadlines.loop.call_soon_threadsafe(self._settle, reply)
        except RuntimeError:
            pass  # The loop is closed, and whoever waited on it is gone.

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
    """A port on which a task of a trio run waits."""

    __slots__ = ("_event", "_reply", "_token", "pending")

    def __init__(self) -> None:
        # Trio is no dependency: it is here if its loop is running.
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
            self._settle(reply)  # A quarter of the time that the way for other threads takes.
            return
        with contextlib.suppress(trio.RunFinishedError):  # The run is over, and whoever waited in it is gone.
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
            self._event.set()  # Late or cancelled, nobody waits any more.
            if self.pending is not None:
                self.pending.drop()
        return self._reply if answered else late()


class ThreadPort:
    """A port on which a thread waits, with no event loop in it."""

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
    """The promise of a reply that an actor gives later: its handler returns it, and the turn ends.

    The actor calls `answer` when it knows; the bus attaches the port of whoever asked. Either may come first. The
    promise of a batch is answered with a sequence of replies. `on_answer` is called when there is nothing left to answer:
    when the reply is given, or when the caller has gone.
    """

    __slots__ = ("_port", "_replies", "on_answer")

    def __init__(self, on_answer: Callable[[DeferredReply], None] | None = None) -> None:
        # Without a lock, which an interruption could leave locked: whichever of `answer` and `attach` comes second sees
        # what the other left. Both may hand the reply over then, and a port takes only the first.
        self._replies: list[Reply | Sequence[Reply]] = []
        self._port: ReplyPort | None = None
        self.on_answer = on_answer

    @property
    def waiting(self) -> bool:
        """Whether a caller may still wait for the answer."""
        return not self._replies and (self._port is None or self._port.waiting)

    def answer(self, reply: Reply | Sequence[Reply]) -> None:
        """Give the answer, from any thread. Only the first call counts."""
        if self._replies:
            return
        self._replies.append(reply)
        if self._replies[0] is reply:
            self.hand_over()

    def hand_over(self) -> None:
        """Hand the answer over, if there is one: again, where that was interrupted."""
        if self._replies:
            if (port := self._port) is not None:
                port.answer(self._replies[0])
            if self.on_answer is not None:
                self.on_answer(self)

    def attach(self, port: ReplyPort) -> None:
        """Name the port that the answer goes to."""
        self._port = port
        if self._replies:
            port.answer(self._replies[0])
        elif isinstance(port, AsyncioPort | TrioPort | ThreadPort):
            port.pending = self

    def drop(self) -> None:
        """Note that the caller waits no more, answered or not."""
        if not self._replies and self.on_answer is not None:
            self.on_answer(self)


def open_port() -> TaskPort:
    """A port on which the running task waits."""
    deadlines = running_deadlines()
    return TrioPort() if deadlines is None else AsyncioPort(deadlines)


def in_event_loop() -> bool:
    """Whether this thread runs an event loop, which a blocking call would stop."""
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
    """What to answer when `address` has not answered within `timeout` seconds."""
    return lambda: Failed.of(CacheTimeoutError("no answer", address, timeout))
