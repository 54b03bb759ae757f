"""SIEVE: one ring, one bit, one hand."""

from __future__ import annotations

from collections.abc import Callable

from .entry import Entry, Ring


class SievePolicy:
    """Gives up the first unvisited entry that a hand meets on its way from old to young.

    SIEVE (Zhang et al., NSDI 2024). Unlike CLOCK's, its survivors stay where they are, so newcomers are sifted
    soon after they arrive. Lazy: a hit only counts. A call of `evict` passes each visited entry once and
    resets it, so the steps are paid for by earlier hits.
    """

    __slots__ = ("_hand", "_ring", "changing", "on_hit")

    on_hit: Callable[[Entry], None] | None

    def __init__(self, capacity: int | None = None) -> None:
        self._ring = Ring()
        self._hand: Entry | None = None
        self.on_hit = None
        self.changing = False

    def admit(self, entry: Entry) -> None:
        entry.visits = 0
        self._ring.append(entry)

    def forget(self, entry: Entry) -> None:
        if entry is self._hand:
            self._hand = self._ring.younger(entry)
        self._ring.remove(entry)

    def evict(self) -> Entry:
        ring = self._ring
        entry = self._hand or ring.oldest()
        while entry.visits:
            entry.visits = 0
            entry = ring.younger(entry) or ring.oldest()
        self._hand = ring.younger(entry)
        ring.remove(entry)
        return entry

    def clear(self) -> None:
        self._ring.clear()
        self._hand = None

    def __len__(self) -> int:
        return self._ring.size
