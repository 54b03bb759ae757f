"""Duels: what a policy learns from the entry that it gave up for another."""

from __future__ import annotations

from collections import OrderedDict

from .entry import Entry

_STEP = 1 / 16
_NUDGE = 1 / 1024
_OVER = 0
"""No gate: stands for the challenger of a duel that is over."""


class Gate:
    """A share of the candidates that may pass, raised by duels won and lowered by duels lost.

    It counts instead of drawing lots: at a share of 1/8 exactly every eighth candidate passes, so the same requests
    always have the same outcome.
    """

    __slots__ = ("_credit", "ceiling", "floor", "share")

    def __init__(self, floor: float, ceiling: float) -> None:
        self.floor = floor
        self.ceiling = ceiling
        self.clear()

    def clear(self) -> None:
        """Forget what was learned: back to the ceiling."""
        self.share = self.ceiling
        self._credit = 0.0

    def passes(self) -> bool:
        """Whether the next candidate may pass."""
        self._credit += self.share
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True

    def judge(self, won: bool) -> None:
        """Learn from one duel. The nudge keeps a share at a floor of 0 from staying there for ever."""
        if won:
            self.share = min(self.ceiling, self.share + _STEP * (self.ceiling - self.share) + _NUDGE)
        else:
            self.share = max(self.floor, self.share * (1.0 - _STEP))


class Duels:
    """Which of two was the better one to keep: the challenger that came in, or the defender that went for it?

    The one that is asked for first wins. The defender's return is a miss, which the policy sees; the challenger's
    hit shows in its `visits` when the hand of the policy passes, when the defender returns, or when the defender
    is too old to be remembered.

    Remembers the keys of defenders only, and a challenger only while it is resident: no value outlives its entry.
    `Entry.queue` of a challenger is the number of its gate, which is 1 or more, and `settled` after the duel.
    """

    __slots__ = ("_defenders", "_gates", "_trials", "settled")

    def __init__(self, gates: dict[int, Gate], settled: int) -> None:
        self._gates = gates
        # Not a dict: finding the oldest key of a dict is O(n) in the keys that were deleted before it.
        self._defenders: OrderedDict[str, Entry | int] = OrderedDict()
        self._trials: dict[str, str] = {}
        self.settled = settled
        """The `Entry.queue` of an entry whose duel is over."""

    def __len__(self) -> int:
        """How many defenders are remembered."""
        return len(self._defenders)

    def clear(self) -> None:
        """Forget all duels; the gates are cleared by their owner."""
        self._defenders.clear()
        self._trials.clear()

    def begin(self, challenger: Entry, defender: Entry, gate: int, bound: int) -> None:
        """Remember that `defender` went for `challenger`, and at most `bound` such pairs."""
        challenger.queue = gate
        defenders = self._defenders
        defenders[defender.key] = challenger
        self._trials[challenger.key] = defender.key
        while len(defenders) > bound:
            self._expire()

    def _expire(self) -> None:
        _, challenger = self._defenders.popitem(last=False)
        if isinstance(challenger, int):
            return
        del self._trials[challenger.key]
        if challenger.visits:
            self._gates[challenger.queue].judge(True)
        challenger.queue = self.settled

    def won(self, challenger: Entry) -> None:
        """The challenger was hit while its defender stayed away."""
        self._gates[challenger.queue].judge(True)
        self.forget(challenger)

    def lost(self, challenger: Entry) -> None:
        """The challenger was given up without a hit: lost if the defender returns, else neither was worth the room."""
        self._defenders[self._trials.pop(challenger.key)] = challenger.queue
        challenger.queue = self.settled

    def forget(self, challenger: Entry) -> None:
        """The challenger is no longer on trial, and nothing is to be learned from it any more."""
        self._defenders[self._trials.pop(challenger.key)] = _OVER
        challenger.queue = self.settled

    def returned(self, key: str) -> bool:
        """Whether `key` is a remembered defender, which is asked for again; its duel is settled and forgotten."""
        challenger = self._defenders.pop(key, None)
        if challenger is None:
            return False
        if not isinstance(challenger, int):
            del self._trials[challenger.key]
            self._gates[challenger.queue].judge(challenger.visits > 0)
            challenger.queue = self.settled
        elif challenger != _OVER:
            self._gates[challenger].judge(False)
        return True
