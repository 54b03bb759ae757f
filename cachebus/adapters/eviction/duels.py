"""Duels: what a policy learns from the entry that it gave up for another."""

from __future__ import annotations

from collections import OrderedDict

from .entry import Entry

_STEP = 1 / 16
_NUDGE = 1 / 1024


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
    """

    __slots__ = ("_defenders", "_trials")

    def __init__(self) -> None:
        # By the defender's key: the challenger and the gate it came through; the gate alone when the challenger was given
        # up without a hit; `None` when the duel is over. Not a dict: finding the oldest key of a dict is O(n) in the keys
        # that were deleted before it.
        self._defenders: OrderedDict[str, tuple[Entry, Gate] | Gate | None] = OrderedDict()
        self._trials: dict[str, str] = {}

    def __len__(self) -> int:
        """How many defenders are remembered."""
        return len(self._defenders)

    def clear(self) -> None:
        """Forget all duels; the gates are cleared by their owner."""
        self._defenders.clear()
        self._trials.clear()

    def begin(self, challenger: Entry, defender: Entry, gate: Gate, bound: int) -> None:
        """Remember that `defender` went for `challenger`, and at most `bound` such pairs."""
        defenders = self._defenders
        defenders[defender.key] = (challenger, gate)
        self._trials[challenger.key] = defender.key
        while len(defenders) > bound:
            self._expire()

    def on_trial(self, entry: Entry) -> bool:
        """Whether `entry` is a challenger whose duel is not over."""
        return entry.key in self._trials

    def _expire(self) -> None:
        _, duel = self._defenders.popitem(last=False)
        if isinstance(duel, tuple):
            challenger, gate = duel
            del self._trials[challenger.key]
            if challenger.visits:
                gate.judge(True)

    def won(self, challenger: Entry) -> None:
        """The challenger was hit while its defender stayed away."""
        self._end(challenger).judge(True)

    def lost(self, challenger: Entry) -> None:
        """The challenger was given up without a hit: lost if the defender returns, else neither was worth the room."""
        defender = self._trials[challenger.key]
        self._defenders[defender] = self._end(challenger)

    def forget(self, challenger: Entry) -> None:
        """The challenger is no longer on trial, and nothing is to be learned from it any more."""
        self._end(challenger)

    def returned(self, key: str) -> bool:
        """Whether `key` is a remembered defender, which is asked for again; its duel is settled and forgotten."""
        if key not in self._defenders:
            return False
        duel = self._defenders.pop(key)
        if isinstance(duel, tuple):
            challenger, gate = duel
            del self._trials[challenger.key]
            gate.judge(challenger.visits > 0)
        elif duel is not None:
            duel.judge(False)
        return True

    def _end(self, challenger: Entry) -> Gate:
        """Take the challenger off trial; its defender stays remembered, with nothing to learn. Returns the gate."""
        defender = self._trials.pop(challenger.key)
        duel = self._defenders[defender]
        assert isinstance(duel, tuple)
        self._defenders[defender] = None
        return duel[1]
