"""Recorder of the calls of cachebus's own functions, in every thread of the process, by `sys.setprofile`.

A call counts when a function whose code is in `cachebus/` begins. A coroutine or generator that continues after an
`await` or a `yield` does not count again. Comprehensions do not count, because Python 3.12 inlines them. Calls of
other libraries and of built-in functions do not count.
"""

from __future__ import annotations

import asyncio
import dis
import functools
import gc
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import cachebus

PACKAGE = f"{Path(cachebus.__file__).parent}/"
COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>"}


@dataclass(frozen=True, slots=True)
class Call:
    """One call: the place of its code, and the number of our functions below it on the stack."""

    thread: str
    depth: int
    file: str
    function: str

    def __str__(self) -> str:
        return f"{'  ' * self.depth}{self.file}: {self.function}"


class RecordedLoop(asyncio.SelectorEventLoop):
    """Event loop that marks callbacks started by a timer, such as heartbeats, health checks and deadlines."""

    by_timer = False
    """True if a timer started the running callback, directly or through other callbacks."""

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return super().call_at(when, self._run_by_timer, callback, *args, context=context)

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:  # type: ignore[override]
        if self.by_timer:
            return super().call_soon(self._run_by_timer, callback, *args, context=context)
        return super().call_soon(callback, *args, context=context)

    def _run_by_timer(self, callback: Callable[..., object], *args: Any) -> None:
        self.by_timer = True
        try:
            callback(*args)
        finally:
            self.by_timer = False


def started_by_timer() -> bool:
    """Return `True` if a timer of this thread's loop started the running callback."""
    loop = asyncio._get_running_loop()
    return isinstance(loop, RecordedLoop) and loop.by_timer


class Recorder:
    """Recorder of the calls made while `on` is true. It sees threads that begin after `installed` was entered."""

    def __init__(self) -> None:
        self.on = False
        self._seen: list[tuple[str, int, CodeType]] = []

    @contextmanager
    def installed(self) -> Generator[Recorder]:
        """Watch this thread, and all threads that begin later, until the block ends."""
        before = threading.getprofile(), sys.getprofile()
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)
        try:
            yield self
        finally:
            self.on = False
            threading.setprofile(before[0])
            sys.setprofile(before[1])

    @contextmanager
    def recording(self) -> Generator[None]:
        """Clear the recording, and record until the block ends.

        The garbage collector is off, so that it makes no calls.
        """
        self._seen.clear()
        gc.disable()
        self.on = True
        try:
            yield
        finally:
            self.on = False
            gc.enable()

    @property
    def count(self) -> int:
        """Number of recorded calls."""
        return len(self._seen)

    def calls(self) -> list[Call]:
        """Return the recorded calls in order."""
        return [
            Call(thread, depth, code.co_filename[len(PACKAGE) :], getattr(code, "co_qualname", code.co_name))
            for thread, depth, code in self._seen
        ]

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if not self.on or event != "call":
            return
        code = frame.f_code
        if is_ours(code) and frame.f_lasti == begins_at(code) and not started_by_timer():
            self._seen.append((thread_name(), depth_of(frame), code))


@functools.cache
def is_ours(code: CodeType) -> bool:
    """Return `True` if a call of this code counts."""
    return code.co_filename.startswith(PACKAGE) and code.co_name not in COMPREHENSIONS


@functools.cache
def begins_at(code: CodeType) -> int:
    """Return the offset of the instruction at which a call begins. A continued coroutine is at another one."""
    return next(each.offset for each in dis.get_instructions(code) if each.opname == "RESUME" and each.arg == 0)


def thread_name() -> str:
    """Return `caller` for the main thread, otherwise the name of the end that the thread stands for."""
    name = threading.current_thread().name
    return "caller" if name == "MainThread" else name.rpartition("_")[0] or name


def depth_of(frame: FrameType) -> int:
    """Return the number of our functions below this one on the stack."""
    depth, below = 0, frame.f_back
    while below is not None:
        depth += is_ours(below.f_code)
        below = below.f_back
    return depth
