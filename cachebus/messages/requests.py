"""Requests to a backend. Each class declares its reply types; any request may also get `Failed`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from .base import IdempotentRequest, Request
from .leases import LoadMetadata
from .replies import (
    Admitted,
    Cleared,
    Deleted,
    Description,
    Found,
    FoundMany,
    Incremented,
    Invalidated,
    Missing,
    NotStored,
    Pong,
    Present,
    RateLimitDenied,
    Scanned,
    Snapshot,
    Stored,
    StoredMany,
)

Ttl = float | Literal["default"] | None
"""Time to live in seconds. `"default"` uses the backend's default; `None` means no expiry."""


class Get(IdempotentRequest[Found | Missing], frozen=True, gc=False, tag="backend.get"):
    """Read one key."""

    key: str


class GetMany(IdempotentRequest[FoundMany], frozen=True, gc=False, tag="backend.get_many"):
    """Read several keys."""

    keys: tuple[str, ...]


class Exists(IdempotentRequest[Present | Missing], frozen=True, gc=False, tag="backend.exists"):
    """Check if a key has a live value, and return its remaining time to live. Counts neither as a hit nor as a miss."""

    key: str


class Set(Request[Stored | NotStored], frozen=True, tag="backend.set"):
    """Store a value.

    With `only_if`, the key must have no value (`absent`) or a value (`present`). With `lease`, the lease must still be
    held, and the write ends it. `metadata` describes the load that produced the value.
    """

    key: str
    value: Any
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()
    only_if: Literal["absent", "present"] | None = None
    lease: str | None = None
    metadata: LoadMetadata | None = None


class SetMany(Request[StoredMany], frozen=True, tag="backend.set_many"):
    """Store several values with the same TTL and tags.

    Like every write, it is not idempotent: a repetition after a delete would restore the values.
    """

    items: Mapping[str, Any]
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._freeze("items")


class Add(Request[Stored | NotStored], frozen=True, tag="backend.add"):
    """Store a value if the key has no live value."""

    key: str
    value: Any
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()


class CompareAndSet(Request[Stored | NotStored], frozen=True, tag="backend.compare_and_set"):
    """Store a value if the current value still has the given `version`."""

    key: str
    value: Any
    version: float
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()


class Touch(IdempotentRequest[Present | Missing], frozen=True, gc=False, tag="backend.touch"):
    """Set the time to live of a live value, counted from now."""

    key: str
    ttl: Ttl = "default"


class Increment(Request[Incremented | Missing], frozen=True, gc=False, tag="backend.increment"):
    """Add `delta` to an integer atomically.

    A missing key starts at `initial` with `ttl`; if `initial` is `None`, the reply is `Missing`. An existing key keeps
    its time to live.
    """

    key: str
    delta: int = 1
    initial: int | None = 0
    ttl: Ttl = "default"


class Delete(IdempotentRequest[Deleted], frozen=True, gc=False, tag="backend.delete"):
    """Remove one key."""

    key: str
    INVALIDATES: ClassVar[bool] = True


class DeleteMany(IdempotentRequest[Deleted], frozen=True, gc=False, tag="backend.delete_many"):
    """Remove several keys."""

    keys: tuple[str, ...]
    INVALIDATES: ClassVar[bool] = True


class DeletePattern(IdempotentRequest[Deleted], frozen=True, gc=False, tag="backend.delete_pattern"):
    """Remove every key that matches a glob pattern.

    `*` matches any run of characters, `?` one character, `[abc]` one of the set. `\\` escapes the next character.
    """

    pattern: str
    INVALIDATES: ClassVar[bool] = True


class Scan(IdempotentRequest[Scanned], frozen=True, gc=False, tag="backend.scan"):
    """List the keys that match a glob pattern, page by page.

    Keys added or removed during the scan may or may not appear.
    """

    pattern: str = "*"
    cursor: str = ""


class InvalidateTags(IdempotentRequest[Invalidated], frozen=True, gc=False, tag="backend.invalidate_tags"):
    """Invalidate every entry that has one of the tags."""

    tags: tuple[str, ...]
    INVALIDATES: ClassVar[bool] = True


class Clear(IdempotentRequest[Cleared], frozen=True, gc=False, tag="backend.clear"):
    """Remove every key of the namespace."""

    INVALIDATES: ClassVar[bool] = True


class Admit(Request[Admitted | RateLimitDenied], frozen=True, gc=False, tag="rate.admit"):
    """Take `cost` units of a rate limit of `limit` units per `per` seconds. At most `burst` units can be taken at once.

    `key` names the limit and is unrelated to the cache entry under the same key. Units that become available within
    `wait` seconds can be reserved in advance.
    """

    key: str
    limit: int
    per: float
    burst: int
    cost: int = 1
    wait: float = 0.0

    MOST: ClassVar[int] = 10**9
    """Largest value of `limit`, `burst` and `cost`, in units."""

    LONGEST: ClassVar[float] = 1e9
    """Largest value, in seconds, of `per`, `wait` and the time to refill. Larger values would overflow 64 bits."""


class Ping(IdempotentRequest[Pong], frozen=True, gc=False, tag="actor.ping"):
    """Check that the actor handles messages."""


class Describe(IdempotentRequest[Description], frozen=True, gc=False, tag="actor.describe"):
    """Return a description of the actor."""


class TakeSnapshot(IdempotentRequest[Snapshot], frozen=True, gc=False, tag="actor.take_snapshot"):
    """Return the counters of the backend."""


class Sweep(IdempotentRequest[Deleted], frozen=True, gc=False, tag="actor.sweep"):
    """Remove expired entries. A backend sends it to itself when the next entry expires."""
