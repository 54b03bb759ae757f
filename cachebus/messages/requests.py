"""Requests: what a backend can be asked to do. Each names its replies; any of them may also get `Failed`."""

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
"""Seconds to live; `"default"` leaves it to the backend, `None` is no expiry."""


class Get(IdempotentRequest[Found | Missing], frozen=True, gc=False, tag="backend.get"):
    """Read one key."""

    key: str


class GetMany(IdempotentRequest[FoundMany], frozen=True, gc=False, tag="backend.get_many"):
    """Read several keys."""

    keys: tuple[str, ...]


class Exists(IdempotentRequest[Present | Missing], frozen=True, gc=False, tag="backend.exists"):
    """Ask if a key has a live value, and for how long. It counts neither as hit nor as miss."""

    key: str


class Set(Request[Stored | NotStored], frozen=True, tag="backend.set"):
    """Store a value: with `only_if`, only if the key has none (`absent`) or has one (`present`); with `lease`, only if that lease is
    still held, which this ends. `metadata` is that of the load."""

    key: str
    value: Any
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()
    only_if: Literal["absent", "present"] | None = None
    lease: str | None = None
    metadata: LoadMetadata | None = None


class SetMany(Request[StoredMany], frozen=True, tag="backend.set_many"):
    """Store several values with one TTL and the same tags.

    Not idempotent, as no write is: repeated after a delete, it would bring the values back.
    """

    items: Mapping[str, Any]
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._freeze("items")


class Add(Request[Stored | NotStored], frozen=True, tag="backend.add"):
    """Store a value if the key has none."""

    key: str
    value: Any
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()


class CompareAndSet(Request[Stored | NotStored], frozen=True, tag="backend.compare_and_set"):
    """Store a value if the key still has the one that was read at `version`."""

    key: str
    value: Any
    version: float
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()


class Touch(IdempotentRequest[Present | Missing], frozen=True, gc=False, tag="backend.touch"):
    """Give a live value a new time to live, counted from now."""

    key: str
    ttl: Ttl = "default"


class Increment(Request[Incremented | Missing], frozen=True, gc=False, tag="backend.increment"):
    """Add `delta` to an integer, in one step. A missing key starts at `initial`, with `ttl`, unless that is `None`. An existing one
    keeps its time to live."""

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
    """Remove every key that a glob matches: `*` is any run of characters, `?` is one, `[abc]` one of these, `\\` takes
    the next character as it stands."""

    pattern: str
    INVALIDATES: ClassVar[bool] = True


class Scan(IdempotentRequest[Scanned], frozen=True, gc=False, tag="backend.scan"):
    """List keys that a glob matches, a page at a time. Keys that come or go meanwhile may be listed or not."""

    pattern: str = "*"
    cursor: str = ""


class InvalidateTags(IdempotentRequest[Invalidated], frozen=True, gc=False, tag="backend.invalidate_tags"):
    """Make every entry that carries one of the tags unreadable."""

    tags: tuple[str, ...]
    INVALIDATES: ClassVar[bool] = True


class Clear(IdempotentRequest[Cleared], frozen=True, gc=False, tag="backend.clear"):
    """Remove every key of the namespace."""

    INVALIDATES: ClassVar[bool] = True


class Admit(Request[Admitted | RateLimitDenied], frozen=True, gc=False, tag="rate.admit"):
    """Take `cost` units of a rate limit of `limit` units in `per` seconds, of which `burst` may be taken at once.

    `key` names the limit; it has nothing to do with the value under the same key. Units that
    will be there within `wait` seconds are taken in advance.
    """

    key: str
    limit: int
    per: float
    burst: int
    cost: int = 1
    wait: float = 0.0

    MOST: ClassVar[int] = 10**9
    """Units that `limit`, `burst` and `cost` may be."""

    LONGEST: ClassVar[float] = 1e9
    """Seconds that `per`, `wait` and filling up again may take: beyond that numbers of 64 bits get short."""


class Ping(IdempotentRequest[Pong], frozen=True, gc=False, tag="actor.ping"):
    """Ask if the actor takes turns."""


class Describe(IdempotentRequest[Description], frozen=True, gc=False, tag="actor.describe"):
    """Ask for a description of the actor."""


class TakeSnapshot(IdempotentRequest[Snapshot], frozen=True, gc=False, tag="actor.take_snapshot"):
    """Ask for the counters."""


class Sweep(IdempotentRequest[Deleted], frozen=True, gc=False, tag="actor.sweep"):
    """Remove what has expired. A backend sends it to itself when the next entry is due."""
