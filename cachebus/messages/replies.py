"""Replies: what became of a request. No booleans, and no `None` to guess at."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Any, Literal

from .base import Reply, message
from .errors import CacheError, rebuild


@message("reply.found")
class Found(Reply):
    """A live value. `version` is a number that grows with every write of the key, exact in 64-bit floats; `ttl` is the seconds left, `None` without expiry;
    `stored_at` is Unix time in seconds."""

    value: Any
    version: float = 0.0
    ttl: float | None = None
    tags: tuple[str, ...] = ()
    stored_at: float = 0.0


@message("reply.missing")
class Missing(Reply):
    """There is no live value under the key."""


@message("reply.found_many")
class FoundMany(Reply):
    """The live values among the keys that were asked for; a key that is not here has none."""

    entries: dict[str, Found]


@message("reply.present")
class Present(Reply):
    """There is a live value; this is all of it but the value. `ttl` as in `Found`."""

    version: float = 0.0
    ttl: float | None = None


@message("reply.stored")
class Stored(Reply):
    """The value was stored, and is now at `version`."""

    version: float = 0.0


@message("reply.stored_many")
class StoredMany(Reply):
    """`count` values were stored."""

    count: int


@message("reply.not_stored")
class NotStored(Reply):
    """Nothing changed: the condition of the write did not hold, or the lease under which it was made was lost. `version`
    is that of the value in the way, 0 where there is none."""

    version: float = 0.0
    reason: Literal["condition", "lease_lost"] = "condition"


@message("reply.deleted")
class Deleted(Reply):
    """`count` live values were removed."""

    count: int


@message("reply.cleared")
class Cleared(Reply):
    """The namespace is empty."""


@message("reply.invalidated")
class Invalidated(Reply):
    """Every entry stored before now under one of the tags is gone for every reader."""


@message("reply.incremented")
class Incremented(Reply):
    """The number that the counter holds after the increment."""

    value: int


@message("reply.scanned")
class Scanned(Reply):
    """A page of keys. `cursor` asks for the next one; empty, it was the last."""

    keys: tuple[str, ...]
    cursor: str = ""


@message("reply.pong")
class Pong(Reply):
    """The actor is there and takes turns."""

    address: str


@message("reply.description")
class Description(Reply):
    """What an actor is: the store behind it, its bounds and what it can do."""

    address: str
    store: str
    capabilities: tuple[str, ...] = ()
    limits: dict[str, int | None] = field(default_factory=dict)


@message("reply.snapshot")
class Snapshot(Reply):
    """Counters of a backend since its actor started, and gauges of now. Whoever shows them says so.

    `removals` counts by `RemovalCause`. `weight` is in bytes where the store has a weigher, else 0. `overloaded`
    counts the requests that a full mailbox turned away. `guard` says how the backend has been doing, by the names of
    `GuardStatistics`; it is empty where nothing needs a guard. `payload` says what the asking cache has made of values,
    by the names of `PayloadStatistics`; it is empty where values stay objects. `errors` and `dropped_writes` are
    counted by the cache that asked, too: the calls of its own that the backend failed, and among these the writes that
    were dropped.
    """

    address: str
    store: str
    hits: int = 0
    misses: int = 0
    sets: int = 0
    removals: dict[str, int] = field(default_factory=dict)
    entries: int = 0
    max_entries: int | None = None
    weight: int = 0
    max_bytes: int | None = None
    restarts: int = 0
    overloaded: int = 0
    guard: dict[str, Any] = field(default_factory=dict)
    payload: dict[str, Any] = field(default_factory=dict)
    errors: int = 0
    dropped_writes: int = 0

    def with_failures(self, errors: int, dropped_writes: int) -> Snapshot:
        """The same, with what a cache has counted."""
        whole: Any = self
        seen: Snapshot = replace(whole, errors=errors, dropped_writes=dropped_writes)
        return seen

    @property
    def requests(self) -> int:
        """How many keys were read, found or not."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits over keys read, 0.0 to 1.0; 0.0 before the first read."""
        return self.hits / self.requests if self.requests else 0.0


@message("reply.failed")
class Failed(Reply):
    """The request failed with the error that `code` and `fields` describe; `detail` is its sentence."""

    code: str
    detail: str
    fields: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, error: CacheError) -> Failed:
        """The reply that says `error`."""
        return cls(error.code, str(error), error.wire_fields())

    def error(self) -> CacheError:
        """The error that this reply says, as an exception of the same class."""
        return rebuild(self.code, self.detail, self.fields)
