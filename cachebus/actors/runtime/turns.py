"""The token of an actor's turn, and its recovery from a holder that was interrupted.

A signal handler, `PyThreadState_SetAsyncExc` or a stack overflow can raise an exception at any instruction of a turn.
It may strike just after the token was taken or just before it is returned, where a `finally` does not help. Checking
the stack before each turn would cost 180 to 850 ns. Therefore a turn returns its token only when it ends normally.
The next caller that finds the token missing searches the stacks of all threads for the holder. If no thread is inside
the turn, the caller takes it over.
"""

from __future__ import annotations

import functools
import gc
import inspect
import operator
import signal
import sys
from collections.abc import Collection
from types import CodeType, FrameType
from typing import Any

from cachebus.bus.compat import calling_frame

_RESUMABLE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR

Token = dict[str, Any]
"""A dict, because `setdefault` atomically decides which of several threads creates the successor of a lost token."""


_frames_of_threads = sys._current_frames  # pyright: ignore[reportPrivateUsage]  # documented
_IS_SUSPENDED = operator.attrgetter("task.cr_suspended")


class _NoTask:
    cr_suspended = False


class TurnToken:
    """The token of the turn of `owner`. Only the owner's methods with these `codes` hold it.

    `free` contains the token while no turn is running. `free.pop()` takes it and `free.append(token)` returns it;
    both are atomic. `task` is the coroutine that holds the token across its awaits.
    """

    __slots__ = ("_codes", "_newest", "_owner", "free", "task")

    def __init__(self, owner: object, codes: Collection[CodeType]) -> None:
        self._owner = owner
        self._codes = codes
        self._newest: Token = {}
        self.free: list[Token] = [self._newest]
        self.task: Any = _NoTask

    def __repr__(self) -> str:
        return f"<TurnToken {'free' if self.free else 'taken'}>"

    def held_here(self) -> bool:
        """True if this thread is inside the turn. A turn does not record its thread, because that would cost 50 ns."""
        return not self.free and self._is_inside(calling_frame(1))

    def claim(self) -> Token | None:
        """Take over the turn if its holder was interrupted. Return `None` if the turn is free or running."""
        lost = self._newest
        while (successor := lost.get("successor")) is not None:
            lost = successor
        if self._is_held():
            return None
        mine: Token = {}
        # A lost token gets exactly one successor, even if several threads detect the loss or are interrupted here.
        won: bool = lost.setdefault("successor", mine) is mine
        if not won:
            return None
        self._newest = mine
        return mine

    def _is_held(self) -> bool:
        # A lost turn stays lost, so a second check must have the same result.
        return self._seems_held() or self._seems_held()

    def _seems_held(self) -> bool:
        # Frames, `free` and the task are read in one C call, during which no other thread runs. Otherwise the turn
        # could be returned and taken again between two reads. Garbage collection is disabled meanwhile: some Python
        # releases create the frames while holding a lock that a starting thread needs. A finalizer that lets other
        # threads run would then deadlock the process (https://github.com/python/cpython/issues/106883).
        restore = gc.enable if gc.isenabled() else gc.isenabled
        waits_of: Any = functools.partial(_IS_SUSPENDED, self)
        reads: tuple[Any, ...] = (gc.disable, _frames_of_threads, self.free.__len__, waits_of, restore)
        _, frames, free, waits, _ = map(operator.call, reads)
        return bool(free or waits) or any(map(self._is_inside, frames.values()))

    def _is_inside(self, frame: FrameType | None) -> bool:
        """True if `frame` or one of its callers holds the turn, or if that cannot be ruled out."""
        without = flags = 0
        while frame is not None:
            code = frame.f_code
            flags = code.co_flags
            if code is _CLAIM and frame.f_locals["self"] is self and "mine" not in frame.f_locals:
                without = 2  # This thread is only checking: neither the caller of `claim` nor its caller has the token.
            elif code in self._codes and frame.f_locals.get("self") is self._owner:
                if not without:
                    return True
                without -= 1
            frame = frame.f_back
        # Other threads keep running while their frames are examined. A generator or coroutine that was suspended
        # meanwhile has lost the link to its caller, so a holder may be missing from the stack. A complete stack ends
        # in a function.
        return bool(flags & _RESUMABLE)


_CLAIM = TurnToken.claim.__code__


def is_interruption(error: BaseException) -> bool:
    """True if an exception was raised into a turn from outside and is not an error of the turn itself.

    These are exceptions that are not an `Exception`, stack overflow, lack of memory, and exceptions raised by a signal
    handler or `PyThreadState_SetAsyncExc`, such as the time limits of Celery and RQ.
    """
    if not isinstance(error, Exception) or isinstance(error, (RecursionError, MemoryError)):
        return True
    handlers = {_code_of(signal.getsignal(each)) for each in signal.valid_signals()} - {None}
    trace, last = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        last, trace = trace.tb_frame, trace.tb_next
    # This package never raises an exception class of the application, so it was raised from outside.
    return (
        last is not None
        and last.f_globals.get("__name__", "").startswith("cachebus.")
        and type(error).__module__.partition(".")[0] not in {"builtins", "cachebus"}
    )


def _code_of(handler: Any) -> CodeType | None:
    while isinstance(handler, functools.partial):
        handler = handler.func
    function = handler if hasattr(handler, "__code__") else getattr(handler, "__func__", type(handler).__call__)
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None
