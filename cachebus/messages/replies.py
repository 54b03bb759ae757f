"""Replies: the outcome of a request, as a distinct type instead of a boolean or `None`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from .base import Reply
from .errors import CacheError, rebuild


class Found(Reply, frozen=True, tag="reply.found"):
    """A live value.

    `version` grows with every write of the key, and a 64-bit float holds it exactly. `ttl` is the remaining time to
    live in seconds, `None` without expiry. `stored_at` is Unix time in seconds.
    """

    value: Any
    version: float = 0.0
    ttl: float | None = None
    tags: tuple[str, ...] = ()
    stored_at: float = 0.0


class Loaded(Found, frozen=True, tag="reply.loaded"):
    """A live value with its `LoadMetadata`.

    `lifetime` is its original time to live in seconds, `None` without expiry.
    """

    load_time: float = 0.0
    stale_for: float = 0.0
    etag: str | None = None
    lifetime: float | None = None


class Missing(Reply, frozen=True, gc=False, tag="reply.missing"):
    """The key has no live value."""


class FoundMany(Reply, frozen=True, tag="reply.found_many"):
    """The live values of the requested keys. Keys without a live value are left out."""

    entries: Mapping[str, Found | Loaded]

    def __post_init__(self) -> None:
        self._freeze("entries")


class Present(Reply, frozen=True, gc=False, tag="reply.present"):
    """The key has a live value, which is not included. `ttl` is as in `Found`."""

    version: float = 0.0
    ttl: float | None = None


class Stored(Reply, frozen=True, gc=False, tag="reply.stored"):
    """The value was stored with `version`."""

    version: float = 0.0


class StoredMany(Reply, frozen=True, gc=False, tag="reply.stored_many"):
    """`count` values were stored."""

    count: int


class NotStored(Reply, frozen=True, gc=False, tag="reply.not_stored"):
    """Nothing changed: the write's condition did not hold, or its lease was lost.

    `version` is the version of the current value, or 0 if there is none.
    """

    version: float = 0.0
    reason: Literal["condition", "lease_lost"] = "condition"


class Deleted(Reply, frozen=True, gc=False, tag="reply.deleted"):
    """`count` live values were removed."""

    count: int


class Cleared(Reply, frozen=True, gc=False, tag="reply.cleared"):
    """The namespace is empty."""


class Invalidated(Reply, frozen=True, gc=False, tag="reply.invalidated"):
    """Every entry stored with one of the tags before now is invalid for every reader."""


class Incremented(Reply, frozen=True, gc=False, tag="reply.incremented"):
    """The value of the counter after the increment."""

    value: int


class Scanned(Reply, frozen=True, gc=False, tag="reply.scanned"):
    """A page of keys. Pass `cursor` to the next `Scan`; it is empty on the last page."""

    keys: tuple[str, ...]
    cursor: str = ""


class Admitted(Reply, frozen=True, gc=False, tag="reply.admitted"):
    """The units were taken, and the caller may continue after `delay` seconds.

    `remaining` units can still be taken at once. The limit is fully replenished after `reset_after` seconds.
    """

    remaining: int
    reset_after: float = 0.0
    delay: float = 0.0


class RateLimitDenied(Reply, frozen=True, gc=False, tag="reply.rate_limit_denied"):
    """No units were taken.

    If no other caller takes units, the same request is admitted after `retry_after` seconds. The other fields are as in
    `Admitted`.
    """

    remaining: int
    retry_after: float
    reset_after: float = 0.0


class Pong(Reply, frozen=True, gc=False, tag="reply.pong"):
    """The actor is running and handles messages."""

    address: str


class Description(Reply, frozen=True, tag="reply.description"):
    """Description of an actor: its store, capabilities and limits."""

    address: str
    store: str
    capabilities: tuple[str, ...] = ()
    limits: Mapping[str, int | None] = msgspec.field(default_factory=dict[str, int | None])

    def __post_init__(self) -> None:
        self._freeze("limits")


class Snapshot(Reply, frozen=True, tag="reply.snapshot"):
    """Counters of a backend since its actor started, and current gauges.

    `removals` counts by `RemovalCause`. `weight` is in bytes if the store has a weigher, otherwise 0. `overloaded`
    counts requests that a full mailbox rejected. `guard` has the fields of `GuardStatistics`; it is empty without a
    guard.

    The cache that requested the snapshot counts the rest for itself. `payload` has the fields of `PayloadStatistics`;
    it is empty if values are stored as objects. `errors` counts calls that the backend failed, and `dropped_writes` the
    writes among them that were dropped.
    """

    address: str
    store: str
    hits: int = 0
    misses: int = 0
    sets: int = 0
    removals: Mapping[str, int] = msgspec.field(default_factory=dict[str, int])
    entries: int = 0
    max_entries: int | None = None
    weight: int = 0
    max_bytes: int | None = None
    restarts: int = 0
    overloaded: int = 0
    guard: Mapping[str, Any] = msgspec.field(default_factory=dict[str, Any])
    payload: Mapping[str, Any] = msgspec.field(default_factory=dict[str, Any])
    errors: int = 0
    dropped_writes: int = 0

    def __post_init__(self) -> None:
        self._freeze("removals", "guard", "payload")

    @property
    def requests(self) -> int:
        """Number of keys read, hits and misses."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Ratio of hits to keys read, from 0.0 to 1.0. It is 0.0 before the first read."""
        return self.hits / self.requests if self.requests else 0.0


class Failed(Reply, frozen=True, tag="reply.failed"):
    """The request failed. `code` and `fields` describe the error, and `detail` is its message."""

    code: str
    detail: str
    fields: Mapping[str, Any] = msgspec.field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self._freeze("fields")

    @classmethod
    def of(cls, error: CacheError) -> Failed:
        """Return the reply for an error."""
        return cls(error.code, str(error), error.wire_fields())

    def error(self) -> CacheError:
        """Return the error as an exception of its original class."""
        return rebuild(self.code, self.detail, self.fields)
