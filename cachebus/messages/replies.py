"""Replies: what became of a request. No booleans, and no `None` to guess at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from .base import Reply
from .errors import CacheError, rebuild


class Found(Reply, frozen=True, tag="reply.found"):
    """A live value. `version` grows with every write of the key, exact in 64-bit floats; `ttl` is the seconds left, `None` without
    expiry; `stored_at` is Unix time in seconds."""

    value: Any
    version: float = 0.0
    ttl: float | None = None
    tags: tuple[str, ...] = ()
    stored_at: float = 0.0


class Loaded(Found, frozen=True, tag="reply.loaded"):
    """A live value with its `LoadMetadata`. `lifetime` is the seconds that it was given, `None` without expiry."""

    load_time: float = 0.0
    stale_for: float = 0.0
    etag: str | None = None
    lifetime: float | None = None


class Missing(Reply, frozen=True, gc=False, tag="reply.missing"):
    """There is no live value under the key."""


class FoundMany(Reply, frozen=True, tag="reply.found_many"):
    """The live values among the keys that were asked for; a key that is not here has none."""

    entries: Mapping[str, Found | Loaded]

    def __post_init__(self) -> None:
        self._freeze("entries")


class Present(Reply, frozen=True, gc=False, tag="reply.present"):
    """There is a live value; this is all of it but the value. `ttl` as in `Found`."""

    version: float = 0.0
    ttl: float | None = None


class Stored(Reply, frozen=True, gc=False, tag="reply.stored"):
    """The value was stored, and is now at `version`."""

    version: float = 0.0


class StoredMany(Reply, frozen=True, gc=False, tag="reply.stored_many"):
    """`count` values were stored."""

    count: int


class NotStored(Reply, frozen=True, gc=False, tag="reply.not_stored"):
    """Nothing changed: the condition of the write did not hold, or its lease was lost. `version` is that of the present value, 0 if
    there is none."""

    version: float = 0.0
    reason: Literal["condition", "lease_lost"] = "condition"


class Deleted(Reply, frozen=True, gc=False, tag="reply.deleted"):
    """`count` live values were removed."""

    count: int


class Cleared(Reply, frozen=True, gc=False, tag="reply.cleared"):
    """The namespace is empty."""


class Invalidated(Reply, frozen=True, gc=False, tag="reply.invalidated"):
    """Every entry stored before now under one of the tags is gone for every reader."""


class Incremented(Reply, frozen=True, gc=False, tag="reply.incremented"):
    """The number that the counter holds after the increment."""

    value: int


class Scanned(Reply, frozen=True, gc=False, tag="reply.scanned"):
    """A page of keys. `cursor` asks for the next one; empty, it was the last."""

    keys: tuple[str, ...]
    cursor: str = ""


class Admitted(Reply, frozen=True, gc=False, tag="reply.admitted"):
    """The units were taken, and the caller may go on after `delay` seconds. `remaining` units are left to be taken at once; all
    are back `reset_after` seconds from now."""

    remaining: int
    reset_after: float = 0.0
    delay: float = 0.0


class RateLimitDenied(Reply, frozen=True, gc=False, tag="reply.rate_limit_denied"):
    """No units were taken. If no other caller takes any, the same will be admitted `retry_after` seconds from now. The rest is as
    in `Admitted`."""

    remaining: int
    retry_after: float
    reset_after: float = 0.0


class Pong(Reply, frozen=True, gc=False, tag="reply.pong"):
    """The actor is there and takes turns."""

    address: str


class Description(Reply, frozen=True, tag="reply.description"):
    """What an actor is: the store behind it, its bounds and what it can do."""

    address: str
    store: str
    capabilities: tuple[str, ...] = ()
    limits: Mapping[str, int | None] = msgspec.field(default_factory=dict[str, int | None])

    def __post_init__(self) -> None:
        self._freeze("limits")


class Snapshot(Reply, frozen=True, tag="reply.snapshot"):
    """Counters of a backend since its actor started, and gauges of the present.

    `removals` counts by `RemovalCause`. `weight` is in bytes if the store has a weigher, else 0. `overloaded` counts the requests
    that a full mailbox refused. `guard` has the fields of `GuardStatistics`, and is empty without a guard. The rest is counted by
    the cache that asked: `payload` has the fields of `PayloadStatistics`, and is empty if values stay objects; `errors` are its
    calls that the backend failed, and `dropped_writes` the writes among them that were dropped.
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
        """The number of keys that were read, found or not."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits over keys read, 0.0 to 1.0; 0.0 before the first read."""
        return self.hits / self.requests if self.requests else 0.0


class Failed(Reply, frozen=True, tag="reply.failed"):
    """The request failed with the error that `code` and `fields` describe; `detail` is its sentence."""

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
        """Return the error of this reply, as an exception of the same class."""
        return rebuild(self.code, self.detail, self.fields)
