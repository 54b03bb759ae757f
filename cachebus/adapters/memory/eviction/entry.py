"""Entries of a memory store, the ring that orders them, and the port of the policy that chooses what is given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

NEVER = float("inf")
"""The `expires_at` of an entry that does not expire."""


class Entry:
    """One key of a memory store: the value, its validity, and a policy's bookkeeping.

    An entry costs 96 bytes; one more slot makes it 112. `prev` and `next` link it into a policy's `Ring`. `visits` counts
    the hits since the policy last looked, up to `VISITS_MAX`. The store counts them itself, so that a hit under a lazy
    policy is one comparison. Under a policy with an `on_hit` it is the policy's own.
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
"""Where `Entry.visits` stops counting: two bits, as in S3-FIFO (Yang et al., SOSP 2023)."""


class WeighedEntry(Entry):
    """An entry of a store that is bounded by bytes: it remembers what the weigher said."""

    __slots__ = ("weight",)

    weight: int


class Ring:
    """A doubly linked ring of entries, oldest first, in which every operation is O(1).

    The links are slots of the entries themselves, so an entry is in one ring at a time.
    """

    __slots__ = ("_root", "size")

    def __init__(self) -> None:
        self._root = Entry("", None, 0.0)
        self.clear()

    def clear(self) -> None:
        """Forget every entry. Entries keep their links: drop them too, or link them again."""
        self._root.prev = self._root.next = self._root
        self.size = 0

    def append(self, entry: Entry) -> None:
        """BackendClient `entry` in as the youngest."""
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
        """Return the entry that was appended first. Raises `IndexError` when the ring is empty."""
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
        """Return the entry that was appended next after `entry`, which must be in this ring; `None` for the youngest."""
        after = entry.next
        return None if after is self._root else after


class EvictionPolicy(Protocol):
    """Orders the entries of a full store by how soon they may go. Every method is O(1), amortised.

    The store makes room *before* it admits an entry, so a value that was just set can be read whatever the policy does.
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

    def __len__(self) -> int: ...
