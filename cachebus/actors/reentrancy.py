"""Finding out whether a thread is inside a turn, from its stack.

A turn keeps no record of the thread that takes it, because that would cost every turn 50 ns. The one caller who needs
to know is about to block, and can afford a walk.
"""

from __future__ import annotations

from collections.abc import Collection
from types import CodeType, FrameType

from cachebus.bus.compat import calling_frame


def on_this_stack(codes: Collection[CodeType], owner: object) -> bool:
    """Whether one of `codes` is running on this thread's stack with `owner` as its `self`."""
    frame: FrameType | None = calling_frame(1)
    while frame is not None:
        if frame.f_code in codes and frame.f_locals.get("self") is owner:
            return True
        frame = frame.f_back
    return False
