"""The token of a turn: the check for its holder."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest

from cachebus.actors.runtime import turns
from cachebus.actors.runtime.turns import Token, TurnToken


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="a frame that was left keeps its callers")
def test_a_stack_whose_callers_are_no_longer_known_counts_as_in_the_turn() -> None:
    """Check a generator that was left after its frame was read. Its caller is unknown, and may be a holder."""
    frames: list[FrameType] = []

    def generator() -> Iterator[None]:
        frames.append(sys._getframe())
        yield

    def function() -> None:
        frames.append(sys._getframe())

    list(generator())
    function()
    token = TurnToken(object(), ())
    left, whole = frames
    assert left.f_back is None
    assert token._is_inside(left)
    assert not token._is_inside(whole)


def test_no_garbage_is_collected_while_the_frames_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that no garbage is collected. A finalizer under the interpreter's lock could deadlock with a new thread."""
    collecting: list[bool] = []

    def frames() -> dict[int, FrameType]:
        collecting.append(gc.isenabled())
        return {}

    monkeypatch.setattr(turns, "_frames_of_threads", frames)
    token = TurnToken(object(), ())
    token.free.pop()
    assert token.claim() is not None
    assert gc.isenabled()
    gc.disable()
    try:
        token.claim()
        assert not gc.isenabled()
    finally:
        gc.enable()
    assert not any(collecting)


def claimed_by_another_thread(token: TurnToken) -> Token | None:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(token.claim).result()


def test_a_turn_that_is_under_way_is_not_taken_over() -> None:
    class Owner:
        def hold(self, token: TurnToken) -> None:
            mine = token.free.pop()
            assert claimed_by_another_thread(token) is None
            token.free.append(mine)

        def be_interrupted(self, token: TurnToken) -> None:
            token.free.pop()

    owner = Owner()
    token = TurnToken(owner, {Owner.hold.__code__, Owner.be_interrupted.__code__})
    owner.hold(token)
    assert token.claim() is None, "a free turn cannot be claimed"
    owner.be_interrupted(token)
    taken = token.claim()
    assert taken is not None
    token.free.append(taken)
    owner.hold(token)
