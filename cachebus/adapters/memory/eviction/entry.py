"""Entries of a memory store, the ring that orders them, and the protocol of eviction policies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

NEVER = float("inf")
"""Value of `expires_at` for an entry that does not expire."""


class Entry:
    """Entry of a memory store: key, value, validity, and the state of the eviction policy.

    An entry takes 96 bytes, or 112 with one more slot. `prev` and `next` link it into a policy's `Ring`. `visits`
    counts the hits since the policy last examined the entry, up to `VISITS_MAX`. For a lazy policy, the store counts
    them, so that a hit costs one comparison. A policy with `on_hit` manages `visits` itself.
    """

    __slots__ = ("expires_at", "key", "next", "prev", "tags", "value", "version", "visits")

    prev: Entry
    next: Entry

    def __init__(
        self, key: str, value: Any, version: float, expires_at: float = NEVER, tags: tuple[str, ...] = ()
    ) -> None:
        self.key = key
        self.value = value
        self.version = version
        self.expires_at = expires_at
        self.tags = tags
        self.visits = 0


VISITS_MAX = 3
"""Maximum of `Entry.visits`: two bits, as in S3-FIFO (Yang et al., SOSP 2023)."""


class WeighedEntry(Entry):
    """Entry of a store with a limit in bytes. `weight` is its size according to the weigher."""

    __slots__ = ("weight",)

    weight: int


class Ring:
    """Doubly linked ring of entries, oldest first. Every operation is O(1).

    The links are slots of the entries, so an entry can be in only one ring at a time.
    """

    __slots__ = ("_root", "size")

    def __init__(self) -> None:
        self._root = Entry("", None, 0.0)
        self.clear()

    def clear(self) -> None:
        """Remove all entries. They keep their links, so drop them or append them again."""
        self._root.prev = self._root.next = self._root
        self.size = 0

    def append(self, entry: Entry) -> None:
        """Append `entry` as the youngest."""
        root = self._root
        last = root.prev
        entry.prev = last
        entry.next = root
        last.next = root.prev = entry
        self.size += 1

    def remove(self, entry: Entry) -> None:
        """Unlink `entry`, which must be in this ring."""
        before, after = entry.prev, entry.next
        before.next, after.prev = after, before
        del entry.prev, entry.next
        self.size -= 1

    def oldest(self) -> Entry:
        """Return the entry that was appended first. Raises `IndexError` if the ring is empty."""
        if not self.size:
            raise IndexError("oldest() of an empty ring")
        return self._root.next

    def rotate(self) -> None:
        """Make the oldest entry the youngest. The ring must not be empty."""
        root = self._root
        moved, last = root.next, root.prev
        if moved is not last:
            root.next = after = moved.next
            after.prev = root
            last.next = root.prev = moved
            moved.prev, moved.next = last, root

    def younger(self, entry: Entry) -> Entry | None:
        """Return the entry appended next after `entry`, which must be in this ring, or `None` for the youngest."""
        after = entry.next
        return None if after is self._root else after


class EvictionPolicy(Protocol):
    """Protocol of eviction policies, which choose the entry to evict. Every method is amortised O(1).

    The store evicts *before* it admits an entry, so a value that was just set can always be read.
    """

    on_hit: Callable[[Entry], None] | None
    """Called on every hit. It is `None` for a lazy policy, for which the store only counts `Entry.visits`."""

    changing: bool
    """True while `on_hit` runs. If it is still true afterwards, `on_hit` was interrupted."""

    def admit(self, entry: Entry) -> None:
        """Add an entry with a new key."""

    def forget(self, entry: Entry) -> None:
        """Remove an entry that was deleted or has expired. It does not count as a victim."""

    def evict(self) -> Entry:
        """Choose an entry to evict, unlink it and return it. The policy must not be empty."""
        ...

    def clear(self) -> None:
        """Remove all entries and reset the policy, including learned state."""

    def __len__(self) -> int: ...
