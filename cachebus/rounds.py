"""Rounds: one question to the backend for everybody in this process who asks it about a key at the same time.

An answer is only good for those who asked before the question left: to a later one it may be out of date. So whoever comes
while a question is under way belongs to the next round, which begins when this one has ended. However many ask, there are
two questions: one under way, and one to come. Tasks that an event loop has woken together, as with the replies of one
batch, are in one round.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

from .flight import ABANDONED, Flight, Raised, Value
from .ways import Way


class Round(Flight):
    """The callers that one question is asked for."""

    __slots__ = ("left", "next")

    def __init__(self) -> None:
        super().__init__()
        self.next: Round | None = None
        self.left = False  # The question, on its way.


class Rounds:
    """The questions of one cache that are under way, by key."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._rounds: dict[str, Round] = {}

    def __len__(self) -> int:
        return len(self._rounds)

    async def ask(self, way: Way, key: str, question: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
        """The answer to a question that is asked after this call began, and whether it was this caller who asked it."""
        while True:
            mine, before, asks = self._enter(key)
            if not asks:
                outcome = await way.wait(mine, None)
                if isinstance(outcome, Raised):
                    raise outcome.error
                if isinstance(outcome, Value):
                    return outcome.value, False
                continue  # Whoever was to ask has gone.
            outcome = ABANDONED
            try:
                if before is not None:
                    await way.wait(before, None)
                else:
                    await way.gather()
                self._begin(key, mine)
                answer = await question()
                outcome = Value(answer)
                return answer, True
            except Exception as error:
                outcome = Raised(error)
                raise
            finally:
                self._end(key, mine, before)
                mine.land(outcome)

    def _enter(self, key: str) -> tuple[Round, Round | None, bool]:
        """The round of a caller who comes now, the one before it, and whether this caller asks for it."""
        with self._guard:
            current = self._rounds.get(key)
            if current is None:
                mine = self._rounds[key] = Round()
                return mine, None, True
            if not current.left:
                return current, None, False
            if current.next is None:
                current.next = Round()
                return current.next, current, True
            return current.next, None, False

    def _begin(self, key: str, mine: Round) -> None:
        with self._guard:
            self._rounds[key] = mine
            mine.left = True

    def _end(self, key: str, mine: Round, before: Round | None) -> None:
        with self._guard:
            if self._rounds.get(key) is mine:
                if mine.next is None:
                    del self._rounds[key]
            elif before is not None and before.next is mine:
                # Gone before its question was asked: who comes now begins another round.
                before.next = None
                if before.landed and self._rounds.get(key) is before:
                    del self._rounds[key]
