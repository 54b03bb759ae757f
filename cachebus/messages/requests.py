"""Requests: what a backend can be asked to do. Each names its replies; any of them may also get `Failed`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from .base import Request, message
from .leases import LoadMetadata
from .replies import (
    Cleared,
    Incremented,
    Deleted,
    Description,
    Found,
    FoundMany,
    Invalidated,
    Missing,
    NotStored,
    Pong,
    Present,
    Scanned,
    Snapshot,
    Stored,
    StoredMany,
)

Ttl = float | Literal["default"] | None
"""Seconds to live; `"default"` leaves it to the backend, `None` is no expiry."""


@message("backend.get")
class Get(Request[Found | Missing]):
    """Read one key."""

    key: str
    IDEMPOTENT: ClassVar[bool] = True


@message("backend.get_many")
class GetMany(Request[FoundMany]):
    """Read several keys."""

    keys: tuple[str, ...]
    IDEMPOTENT: ClassVar[bool] = True


@message("backend.exists")
class Exists(Request[Present | Missing]):
    """Ask whether a key has a live value, and for how long. It is no use of the value: no hit, no miss."""

    key: str
    IDEMPOTENT: ClassVar[bool] = True


@message("backend.set")
class Set(Request[Stored | NotStored]):
    """Store a value; with `only_if`, only where the key has none (`absent`) or has one (`present`); with `lease`, only
    if that lease is still held, which ends with this. `metadata` is what a loaded value keeps of its loading."""

    key: str
    value: Any
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()
    only_if: Literal["absent", "present"] | None = None
    lease: str | None = None
    metadata: LoadMetadata | None = None


@message("backend.set_many")
class SetMany(Request[StoredMany]):
    """Store several values with one TTL and the same tags.

    Not idempotent, as no write is: done once more, after what came in between, it brings back what that deleted.
    """

    items: dict[str, Any]
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()


@message("backend.add")
class Add(Request[Stored | NotStored]):
    """Store a value only where the key has none."""

    key: str
    value: Any
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()


@message("backend.compare_and_set")
class CompareAndSet(Request[Stored | NotStored]):
    """Store a value only where the key still holds the one read at `version`."""

    key: str
    value: Any
    version: float
    ttl: Ttl = "default"
    tags: tuple[str, ...] = ()


@message("backend.touch")
class Touch(Request[Present | Missing]):
    """Give a live value a new time to live, counted from now."""

    key: str
    ttl: Ttl = "default"
    IDEMPOTENT: ClassVar[bool] = True


@message("backend.increment")
class Increment(Request[Incremented | Missing]):
    """Add `delta` to an integer, in one step. A missing key starts at `initial`, with `ttl`; `initial=None` leaves
    it missing. An existing one keeps its time to live."""

    key: str
    delta: int = 1
    initial: int | None = 0
    ttl: Ttl = "default"


@message("backend.delete")
class Delete(Request[Deleted]):
    """Remove one key."""

    key: str
    IDEMPOTENT: ClassVar[bool] = True
    INVALIDATES: ClassVar[bool] = True


@message("backend.delete_many")
class DeleteMany(Request[Deleted]):
    """Remove several keys."""

    keys: tuple[str, ...]
    IDEMPOTENT: ClassVar[bool] = True
    INVALIDATES: ClassVar[bool] = True


@message("backend.delete_pattern")
class DeletePattern(Request[Deleted]):
    """Remove every key that a glob matches: `*` is any run of characters, `?` is one, `[abc]` one of these, `\\` takes
    the next character as it stands."""

    pattern: str
    IDEMPOTENT: ClassVar[bool] = True
    INVALIDATES: ClassVar[bool] = True


@message("backend.scan")
class Scan(Request[Scanned]):
    """List keys that a glob matches, a page at a time. Keys that come or go meanwhile may be listed or not."""

    pattern: str = "*"
    cursor: str = ""
    IDEMPOTENT: ClassVar[bool] = True


@message("backend.invalidate_tags")
class InvalidateTags(Request[Invalidated]):
    """Make every entry that carries one of the tags unreadable."""

    tags: tuple[str, ...]
    IDEMPOTENT: ClassVar[bool] = True
    INVALIDATES: ClassVar[bool] = True


@message("backend.clear")
class Clear(Request[Cleared]):
    """Remove every key of the namespace."""

    IDEMPOTENT: ClassVar[bool] = True
    INVALIDATES: ClassVar[bool] = True


@message("actor.ping")
class Ping(Request[Pong]):
    """Ask whether the actor takes turns."""

    IDEMPOTENT: ClassVar[bool] = True


@message("actor.describe")
class Describe(Request[Description]):
    """Ask what the actor is and can do."""

    IDEMPOTENT: ClassVar[bool] = True


@message("actor.take_snapshot")
class TakeSnapshot(Request[Snapshot]):
    """Ask for the counters."""

    IDEMPOTENT: ClassVar[bool] = True


@message("actor.sweep")
class Sweep(Request[Deleted]):
    """Remove what has expired. A backend sends it to itself when the next entry is due."""

    IDEMPOTENT: ClassVar[bool] = True
