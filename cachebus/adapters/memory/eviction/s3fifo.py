"""The default eviction policy: S3-FIFO with adaptive admission filters."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from .entry import Entry, Ring

SMALL_SHARE = 1 / 25
GHOST_SHARE = 3 / 2
TRIAL_SHARE = 1 / 2

_STEP = 1 / 16
_NUDGE = 1 / 1024


class AdmissionFilter:
    """Filter that admits an adaptive share of the candidates. Trials that are won raise the share; lost ones lower it.

    It counts instead of using random numbers, so the same requests always have the same result.
    """

    def __init__(self, floor: float, ceiling: float) -> None:
        self.floor = floor
        self.ceiling = ceiling
        self.clear()

    def clear(self) -> None:
        """Reset the share to the ceiling."""
        self.share = self.ceiling
        self._credit = 0.0

    def passes(self) -> bool:
        self._credit += self.share
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True

    def judge(self, won: bool) -> None:
        """Adjust the share after a trial. `_NUDGE` lets a share of 0 grow again."""
        if won:
            self.share = min(self.ceiling, self.share + _STEP * (self.ceiling - self.share) + _NUDGE)
        else:
            self.share = max(self.floor, self.share * (1.0 - _STEP))


class AdmissionFeedback:
    """Trials that compare an admitted candidate with the victim evicted for it.

    The one that is requested first wins. If the victim is requested, the policy sees a miss. A hit of the candidate
    increments its `visits`. They are checked when the policy passes the candidate, or when the victim returns or is
    forgotten.

    Only keys of victims are kept, and a candidate only while it is in the cache, so no value outlives its entry.
    """

    def __init__(self) -> None:
        # By the victim's key: the candidate and its filter, only the filter if the candidate was evicted without a hit,
        # or `None` if the trial has ended. In a plain dict, finding the oldest key is O(n) in earlier deletions.
        self._victims: OrderedDict[str, tuple[Entry, AdmissionFilter] | AdmissionFilter | None] = OrderedDict()
        self._trials: dict[str, str] = {}

    def clear(self) -> None:
        """Remove all trials. The owner clears the filters."""
        self._victims.clear()
        self._trials.clear()

    def begin(self, candidate: Entry, victim: Entry, admission: AdmissionFilter, bound: int) -> None:
        """Start a trial of `candidate` against `victim`, and keep at most `bound` trials."""
        victims = self._victims
        victims[victim.key] = (candidate, admission)
        self._trials[candidate.key] = victim.key
        while len(victims) > bound:
            _, trial = victims.popitem(last=False)
            if isinstance(trial, tuple):
                candidate, admission = trial
                del self._trials[candidate.key]
                if candidate.visits:
                    admission.judge(True)

    def on_trial(self, entry: Entry) -> bool:
        """Return true if `entry` is a candidate whose trial has not ended."""
        return entry.key in self._trials

    def lost(self, candidate: Entry) -> None:
        """Record that a candidate was evicted without a hit.

        It loses if the victim returns; otherwise nothing is learned.
        """
        victim = self._trials[candidate.key]
        self._victims[victim] = self.end(candidate)

    def returned(self, key: str) -> bool:
        """Return true if `key`, which is requested again, is a known victim. Decide and remove its trial."""
        if key not in self._victims:
            return False
        trial = self._victims.pop(key)
        if isinstance(trial, tuple):
            candidate, admission = trial
            del self._trials[candidate.key]
            admission.judge(candidate.visits > 0)
        elif trial is not None:
            trial.judge(False)
        return True

    def end(self, candidate: Entry) -> AdmissionFilter:
        """End the trial of a candidate without a result and return its filter. The victim stays known."""
        victim = self._trials.pop(candidate.key)
        trial = self._victims[victim]
        assert isinstance(trial, tuple)
        self._victims[victim] = None
        return trial[1]


class S3FifoPolicy:
    """Policy with a small queue for new entries and a main queue for entries that were hit.

    Based on S3-FIFO (Yang et al., SOSP 2023), which has a small and a main FIFO queue and lazy hits. A ghost queue has
    the keys evicted from the small queue. A key that returns while it is in the ghost queue enters the main queue.

    There are three extensions. docs/decisions/0003-default-eviction-policy.md measures each of them:

    * The main queue is filled first, so that in a loop larger than the cache some keys stay resident.
    * Returning keys pass an `AdmissionFilter` before the main queue. The filter closes in a loop slightly larger than
      the cache, in which each key would replace one that is needed sooner. It stays open if popularity changes.
    * A second filter sometimes lets a new key replace a main entry without hits. Otherwise outdated entries would stay
      in the main queue. Both filters learn from `AdmissionFeedback`.

    `evict` is amortised O(1): it passes an entry only if it takes a visit from it, or moves it once from small to main.
    The ghost queue and the trials keep at most twice as many keys as there are entries, and none before the first
    eviction.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.on_hit: Callable[[Entry], None] | None = None
        self.changing = False
        # By key, because an entry has no slot for its queue. It has only a 25th of the entries.
        self._small: OrderedDict[str, Entry] = OrderedDict()
        self._main = Ring()
        self._ghost: OrderedDict[str, None] = OrderedDict()
        self._return_filter = AdmissionFilter(1 / 16, 1.0)
        self._probation_filter = AdmissionFilter(1 / 64, 1 / 8)
        self._feedback = AdmissionFeedback()
        self._newest: Entry | None = None
        """Last returning key that was admitted, if its victim has not been chosen yet."""
        self._capacity = capacity
        self._measure(capacity)

    def _measure(self, full: int | None) -> None:
        """Set the queue sizes for a store that is full with `full` entries, or `None` while that is unknown.

        The number is configured, or observed at an eviction.
        """
        self._full = full
        size = full or 0
        self._small_share = max(1, int(size * SMALL_SHARE))
        self._main_share = math.inf if full is None else size - self._small_share
        self._ghost_bound = int(size * GHOST_SHARE)
        self._trial_bound = int(size * TRIAL_SHARE) + 1

    def admit(self, entry: Entry) -> None:
        key = entry.key
        entry.visits = 0
        small, main = self._small, self._main
        known = self._feedback.returned(key)
        if key in self._ghost:
            del self._ghost[key]
            known = True
        if known and self._return_filter.passes():
            main.append(entry)
            self._newest = entry
        elif len(small) + main.size < self._main_share:
            main.append(entry)
        else:
            small[key] = entry

    def forget(self, entry: Entry) -> None:
        if self._small.pop(entry.key, None) is not None:
            return
        if self._feedback.on_trial(entry):
            self._feedback.end(entry)
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
            elif main.size and self._probation_filter.passes() and not self._spared(victim := main.oldest()):
                self._leave_main(victim)
                main.append(entry)
                self._feedback.begin(entry, victim, self._probation_filter, self._trial_bound)
                return victim
            else:
                self._ghost[key] = None
                while len(self._ghost) > self._ghost_bound:
                    self._ghost.popitem(last=False)
                return entry
        while self._spared(victim := main.oldest()):
            pass
        newest = self._newest
        self._leave_main(victim)
        if newest is not None and newest is not victim:
            self._newest = None
            self._feedback.begin(newest, victim, self._return_filter, self._trial_bound)
        return victim

    def _spared(self, entry: Entry) -> bool:
        """Return true if the oldest main entry was hit. Take one visit from it and make it the youngest."""
        if not entry.visits:
            return False
        if self._feedback.on_trial(entry):
            self._feedback.end(entry).judge(True)  # Its victim did not return.
        entry.visits -= 1
        self._main.rotate()
        return True

    def _leave_main(self, entry: Entry) -> None:
        self._main.remove(entry)
        if self._feedback.on_trial(entry):
            self._feedback.lost(entry)
        if entry is self._newest:
            self._newest = None

    def clear(self) -> None:
        self._small.clear()
        self._main.clear()
        self._ghost.clear()
        self._feedback.clear()
        self._return_filter.clear()
        self._probation_filter.clear()
        self._newest = None
        self._measure(self._capacity)

    def __len__(self) -> int:
        return len(self._small) + self._main.size
