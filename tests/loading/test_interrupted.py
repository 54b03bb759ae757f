"""After a signal handler raises at any instruction of the load bookkeeping, every key can still be loaded."""

from __future__ import annotations

import dis
import sys
from types import FrameType
from typing import Any

import pytest

from cachebus import SyncCache

from ..facade.faces import a_sync_cache

OURS = (
    "loading/leased_load.py",
    "loading/coordinator.py",
    "loading/singleflight.py",
    "loading/runners.py",
    "client/renewals.py",
    "load_variants.py",
)


class Interrupted(BaseException):
    """Exception of the signal handler."""


class Interruption:
    """Raises once, at the checkpoint with the given number.

    Checkpoints are the points where the interpreter runs signal handlers: after calls, and at the start of functions and
    loops.
    """

    CHECKPOINTS = frozenset(dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD"))

    def __init__(self, at: int) -> None:
        self.left = at
        self.before: dict[FrameType, int] = {}

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.endswith(OURS):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before = self.before.get(frame)
            self.before[frame] = frame.f_code.co_code[frame.f_lasti]
            if before in self.CHECKPOINTS and self.left > 0:
                self.left -= 1
                if not self.left:
                    raise Interrupted
        return self.trace


def interrupted(cache: SyncCache, key: str, at: int, **options: Any) -> bool:
    """Load a key with an interruption at a checkpoint. Return `False` if the load had fewer checkpoints."""
    interruption = Interruption(at)
    sys._getframe().f_trace_opcodes = True  # From 3.12 on, settrace looks for a frame that asks for opcodes.
    sys.settrace(interruption.trace)
    try:
        cache.get_or_load(key, lambda: "interrupted", **options)
    except Interrupted:
        pass
    finally:
        sys.settrace(None)
    return interruption.left <= 0


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("options", [{}, {"stale_for": 5.0, "lease_ttl": 60.0}], ids=["plain", "stale"])
def test_the_next_caller_loads_at_once(options: Any) -> None:
    with a_sync_cache() as cache:
        cache.get_or_load("warm", lambda: "warm", **options)
        at = 1
        while interrupted(cache, f"k{at}", at, **options):
            value = cache.get_or_load(f"k{at}", lambda: "next", **options)
            assert value in ("next", "interrupted"), at
            at += 1
        assert at > 40
