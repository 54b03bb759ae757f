"""The default policy: S3-FIFO with gates that learn."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from .entry import Entry, Ring

SMALL_SHARE = 1 / 25
GHOST_SHARE = 3 / 2
DUEL_SHARE = 1 / 2

_STEP = 1 / 16
_NUDGE = 1 / 1024


class AdmissionFilter:
    """A share of the candidates that may pass, raised by duels won and lowered by duels lost.

    It counts instead of drawing lots, so that the same requests always have the same outcome.
    """

    def __init__(self, floor: float, ceiling: float) -> None:
        self.floor = floor
        self.ceiling = ceiling
        self.clear()

    def clear(self) -> None:
        """Forget what was learned: back to the ceiling."""
        self.share = self.ceiling
        self._credit = 0.0

    def passes(self) -> bool:
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


class AdmissionFeedback:
    """Which of two was the better one to keep: the challenger that came in, or the defender that went for it?

    The one that is asked for first wins. The defender's return is a miss, which the policy sees. The challenger's hit
    shows in its `visits` when the policy passes it, or when the defender returns or is too old to be remembered.

    Remembers the keys of defenders only, and a challenger only while it is resident: no value outlives its entry.
    """

    def __init__(self) -> None:
        # By the defender's key: the challenger and its gate; the gate alone if the challenger was given up without a hit;
        # `None` if the duel is over. In a plain dict, finding the oldest key is O(n) in the keys deleted before it.
        self._defenders: OrderedDict[str, tuple[Entry, AdmissionFilter] | AdmissionFilter | None] = OrderedDict()
        self._trials: dict[str, str] = {}

    def clear(self) -> None:
        """Forget all duels; the gates are cleared by their owner."""
        self._defenders.clear()
        self._trials.clear()

    def begin(self, challenger: Entry, defender: Entry, gate: AdmissionFilter, bound: int) -> None:
        """Remember that `defender` went for `challenger`, and at most `bound` such pairs."""
        defenders = self._defenders
        defenders[defender.key] = (challenger, gate)
        self._trials[challenger.key] = defender.key
        while len(defenders) > bound:
            _, duel = defenders.popitem(last=False)
            if isinstance(duel, tuple):
                challenger, gate = duel
                del self._trials[challenger.key]
                if challenger.visits:
                    gate.judge(True)

    def on_trial(self, entry: Entry) -> bool:
        """Whether `entry` is a challenger whose duel is not over."""
        return entry.key in self._trials

    def lost(self, challenger: Entry) -> None:
        """The challenger was given up without a hit: lost if the defender returns, else neither was worth the room."""
        defender = self._trials[challenger.key]
        self._defenders[defender] = self.end(challenger)

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

    def end(self, challenger: Entry) -> AdmissionFilter:
        """Take the challenger off trial; its defender stays remembered, with nothing to learn. Returns the gate."""
        defender = self._trials.pop(challenger.key)
        duel = self._defenders[defender]
        assert isinstance(duel, tuple)
        self._defenders[defender] = None
        return duel[1]


class S3FifoPolicy:
    """Sifts newcomers in a small queue and keeps the proven in a main one, as much as that proves right.

    From S3-FIFO (Yang et al., SOSP 2023): a small and a main FIFO, lazy hits, and a ghost, the memory of keys that the
    small queue gave up. A key that returns while the ghost knows it goes straight to the main queue.

    Three things are our own. docs/decisions/0003-default-eviction-policy.md says what each is worth:

    * The main queue is filled first, so that a loop larger than the cache finds a set that stays.
    * A returned key passes a `AdmissionFilter` on its way to the main queue. The gate closes in a loop that is a little too large,
      where each key would take the place of one that is due sooner. It stays open if popularity moves.
    * Now and then an unproven key takes the place of a main entry without a hit, if another gate lets it: otherwise
      nothing would push a dead main queue out. The gates learn from `AdmissionFeedback`.

    `evict` is amortised O(1): it passes an entry only by taking a visit from it, or by moving it once from small to main.
    The ghosts together hold at most twice as many keys as there are entries, and none before the first eviction.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.on_hit: Callable[[Entry], None] | None = None
        self.changing = False
        # By key, because that says where an entry is, which has no slot for it. Few: a 25th of the residents.
        self._small: OrderedDict[str, Entry] = OrderedDict()
        self._main = Ring()
        self._ghost: OrderedDict[str, None] = OrderedDict()
        self._return = AdmissionFilter(1 / 16, 1.0)
        self._chance = AdmissionFilter(1 / 64, 1 / 8)
        self._duels = AdmissionFeedback()
        self._newest: Entry | None = None
        """The last returned key let in, whose defender has not been chosen yet."""
        self._capacity = capacity
        self._measure(capacity)

    def _measure(self, full: int | None) -> None:
        """Set the bounds for a store that `full` entries fill: given, or seen at an eviction; `None` while unknown."""
        self._full = full
        size = full or 0
        self._small_share = max(1, int(size * SMALL_SHARE))
        self._main_share = math.inf if full is None else size - self._small_share
        self._ghost_bound = int(size * GHOST_SHARE)
        self._duel_bound = int(size * DUEL_SHARE) + 1

    def admit(self, entry: Entry) -> None:
        key = entry.key
        entry.visits = 0
        small, main = self._small, self._main
        known = self._duels.returned(key)
        if key in self._ghost:
            del self._ghost[key]
            known = True
        if known and self._return.passes():
            main.append(entry)
            self._newest = entry
        elif len(small) + main.size < self._main_share:
            main.append(entry)
        else:
            small[key] = entry

    def forget(self, entry: Entry) -> None:
        if self._small.pop(entry.key, None) is not None:
            return
        if self._duels.on_trial(entry):
            self._duels.end(entry)
        self._leave_main(entry)

    def evict(self) -> Entry:
        small, main = self._small, self._main
        residents = len(small) + main.size
        if residents != self._full:
            self._measure(residents)
        while len(small) >= self._small_share or not main.size:
            key, entry = small.popitem(last=False)
            if entry.visits or main.size < self._main_share:
                entry.visits = 0
                main.append(entry)
            elif main.size and self._chance.passes() and not self._spared(defender := main.oldest()):
                self._leave_main(defender)
                main.append(entry)
                self._duels.begin(entry, defender, self._chance, self._duel_bound)
                return defender
            else:
                self._ghost[key] = None
                while len(self._ghost) > self._ghost_bound:
                    self._ghost.popitem(last=False)
                return entry
        while self._spared(defender := main.oldest()):
            pass
        newest = self._newest
        self._leave_main(defender)
        if newest is not None and newest is not defender:
            self._newest = None
            self._duels.begin(newest, defender, self._return, self._duel_bound)
        return defender

    def _spared(self, entry: Entry) -> bool:
        """Whether the oldest main entry was hit: that costs it a visit and makes it the youngest."""
        if not entry.visits:
            return False
        if self._duels.on_trial(entry):
            self._duels.end(entry).judge(True)  # Its defender stayed away.
        entry.visits -= 1
        self._main.rotate()
        return True

    def _leave_main(self, entry: Entry) -> None:
        self._main.remove(entry)
        if self._duels.on_trial(entry):
            self._duels.lost(entry)
        if entry is self._newest:
            self._newest = None

    def clear(self) -> None:
        self._small.clear()
        self._main.clear()
        self._ghost.clear()
        self._duels.clear()
        self._return.clear()
        self._chance.clear()
        self._newest = None
        self._measure(self._capacity)

    def __len__(self) -> int:
        return len(self._small) + self._main.size
