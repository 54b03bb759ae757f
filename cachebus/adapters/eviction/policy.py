"""The port between a memory store and the policy that chooses what it gives up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .entry import Entry


class EvictionPolicy(Protocol):
    """Orders the entries of a full store by how soon they may go. Every method is O(1), amortised.

    The store makes room *before* it admits: `evict` as often as the bounds ask, then `admit`. So a value that
    was just set is there to be read, whatever the policy thinks of it.
    """

    on_hit: Callable[[Entry], None] | None
    """Called on every hit; `None` for a lazy policy, for which the store only counts `Entry.visits`."""

    changing: bool
    """Set while a hit is being noted by a policy with an `on_hit`: still set later, that was interrupted."""

    def admit(self, entry: Entry) -> None:
        """Take in an entry whose key the store did not hold."""

    def forget(self, entry: Entry) -> None:
        """Drop an entry that was deleted or has expired: it is no victim and leaves no memory of itself."""

    def evict(self) -> Entry:
        """Choose the entry to give up, unlink it and return it. Never called on an empty policy."""
        ...

    def clear(self) -> None:
        """Forget everything, what was learned included."""

    def __len__(self) -> int:
        """How many entries the policy holds."""
        ...
