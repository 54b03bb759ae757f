"""The token of an actor's turn, and how it is taken back from a holder that was interrupted.

An exception of a signal handler, `PyThreadState_SetAsyncExc` or a full stack can end a turn at any instruction, also
just after the token was taken or just before it is given back. No `finally` helps against that, and checking the
stack before each turn costs 180 to 850 ns. So a turn gives its token back only when it ends well. The next caller that
finds the token gone looks for the holder on the stacks of all threads. If no thread is in the turn, it takes over.
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
"""A dict, because `setdefault` decides in one step which of several threads makes the successor of a lost token."""


_frames_of_threads = sys._current_frames  # pyright: ignore[reportPrivateUsage]  # documented
_IS_SUSPENDED = operator.attrgetter("task.cr_suspended")


class _NoTask:
    cr_suspended = False


class TurnToken:
    """The token of the turn of `owner`, whose methods with `codes` are the only ones that hold it.

    `free` holds the token while no one has the turn: `free.pop()` takes it, `free.append(token)` gives it back, and both are
    atomic. `task` is the coroutine that holds the token over its awaits.
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
        """Tell whether this thread is inside the turn. A turn keeps no record of its thread: that would cost 50 ns."""
        return not self.free and self._is_inside(calling_frame(1))

    def claim(self) -> Token | None:
        """Take the turn over if its holder was interrupted; `None` if the turn is free or under way."""
        lost = self._newest
        while (heir := lost.get("heir")) is not None:
            lost = heir
        if self._is_held():
            return None
        mine: Token = {}
        # A token that is lost has one heir, however many threads find that out, and whatever interrupts them.
        won: bool = lost.setdefault("heir", mine) is mine
        if not won:
            return None
        self._newest = mine
        return mine

    def _is_held(self) -> bool:
        # A turn that is lost stays lost, so a second look must find the same.
        return self._seems_held() or self._seems_held()

    def _seems_held(self) -> bool:
        # The three are read in one step of C, during which no other thread runs: else the turn could be given back and
        # taken again between two of them. Without a garbage collection in it: some releases of Python make the frames under
        # a lock that a starting thread needs too, so a finalizer that lets other threads run stops the process for good
        # (https://github.com/python/cpython/issues/106883).
        restore = gc.enable if gc.isenabled() else gc.isenabled
        waits_of: Any = functools.partial(_IS_SUSPENDED, self)
        looks: tuple[Any, ...] = (gc.disable, _frames_of_threads, self.free.__len__, waits_of, restore)
        _, frames, free, waits, _ = map(operator.call, looks)
        return bool(free or waits) or any(map(self._is_inside, frames.values()))

    def _is_inside(self, frame: FrameType | None) -> bool:
        """Tell whether the turn is held by a caller of `frame`, or by `frame` itself, as far as that can be known."""
        without = flags = 0
        while frame is not None:
            code = frame.f_code
            flags = code.co_flags
            if code is _CLAIM and frame.f_locals["self"] is self and "mine" not in frame.f_locals:
                without = 2  # A thread that only looks: neither the caller of `claim` nor its caller has the token.
            elif code in self._codes and frame.f_locals.get("self") is self._owner:
                if not without:
                    return True
                without -= 1
            frame = frame.f_back
        # The other threads go on while their frames are looked at. A generator or coroutine that has been left meanwhile no
        # longer says who called it, and a holder may be among its callers; a complete stack ends in a function.
        return bool(flags & _RESUMABLE)


_CLAIM = TurnToken.claim.__code__


def is_interruption(error: BaseException) -> bool:
    """Tell whether an exception was thrown into a turn from outside, and is no fault of the turn itself.

    That is any `BaseException` which is no `Exception`, a full stack, a lack of memory, and what a signal handler or
    `PyThreadState_SetAsyncExc` raises, such as the time limits of Celery and RQ.
    """
    if not isinstance(error, Exception) or isinstance(error, (RecursionError, MemoryError)):
        return True
    handlers = {_code_of(signal.getsignal(each)) for each in signal.valid_signals()} - {None}
    trace, last = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code in handlers:
            return True
        last, trace = trace.tb_frame, trace.tb_next
    # Nothing of ours raises the class of an application: it was thrown in.
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
