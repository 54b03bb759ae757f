"""The policy of events: redacted keys, and samples of frequent kinds."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

from msgspec.structs import replace

from cachebus.messages import CacheCleared, CacheDeleted, CacheSet, Event, EventsMissed, TagsInvalidated

from .subscription import EventKind, event_kinds

KeyForm: TypeAlias = Literal["plain", "hash", "none"]

UNSAMPLED: frozenset[EventKind] = frozenset({CacheSet, CacheDeleted, CacheCleared, TagsInvalidated, EventsMissed})
"""Kinds that are never sampled: a listener that keeps copies of values goes stale if it misses one."""

_HASH_BYTES = 16
_LONGEST_HASH_KEY = 64  # BLAKE2b takes no longer one.


class EventPolicy:
    """How keys look in events, and which share of the events is published.

    `keys` applies where an event leaves: to listeners of the application, and on NATS. `plain` keeps keys; `hash` makes
    them 32 hexadecimal digits of BLAKE2b, keyed with `hash_key` if there is one, so that equal keys look equal; `none`
    makes them empty. `sample` maps globs over kinds to the share that is published, from 0 to 1; of several globs that fit
    a kind, the first counts. `draw` returns numbers from 0 to below 1.

    Raises `ValueError` for a glob that fits nothing or one of `UNSAMPLED`, for a share out of range, and for a `hash_key`
    that BLAKE2b does not take.
    """

    __slots__ = ("_draw", "_hash", "_hash_key", "_shares", "keys", "redacts", "samples")

    def __init__(
        self,
        keys: KeyForm = "plain",
        hash_key: bytes = b"",
        sample: Mapping[str, float] | None = None,
        *,
        draw: Callable[[], float] = random.random,
    ) -> None:
        if len(hash_key) > _LONGEST_HASH_KEY:
            raise ValueError(f"a hash_key has at most {_LONGEST_HASH_KEY} bytes")
        self.keys: KeyForm = keys
        self.redacts = keys != "plain"
        self._hash_key = hash_key
        self._draw = draw
        if keys == "hash":
            from hashlib import blake2b  # Here, because few need it, and OpenSSL comes with it.

            self._hash = partial(blake2b, digest_size=_HASH_BYTES, key=hash_key)
        self._shares = shares(sample or {})
        self.samples = bool(self._shares)

    def __repr__(self) -> str:
        sampled = {kind.WIRE_NAME: share for kind, share in self._shares.items()}
        return f"<EventPolicy keys={self.keys} {'keyed' if self._hash_key else 'unkeyed'} sample={sampled}>"

    def sampled(self, kind: EventKind) -> bool:
        """Whether to publish the present event of this kind."""
        share = self._shares.get(kind)
        return share is None or self._draw() < share

    def key(self, key: str) -> str:
        """A key as events show it. An empty key stays empty."""
        if not key or not self.redacts:
            return key
        return "" if self.keys == "none" else self._hash(key.encode("utf-8", "surrogatepass")).hexdigest()

    def redacted(self, event: Event) -> Event:
        """The event as it leaves: itself, or a copy with its key redacted."""
        key: str | None = getattr(event, "key", None)
        changed: dict[str, Any] = {"key": self.key(key)} if key and self.redacts else {}
        return replace(event, **changed) if changed else event


def shares(sample: Mapping[str, float]) -> dict[EventKind, float]:
    """The share of each kind that is sampled. Raises `ValueError`."""
    found: dict[EventKind, float] = {}
    for glob, share in sample.items():
        if not 0 <= share <= 1:
            raise ValueError(f"the share of {glob!r} is a number from 0 to 1, not {share!r}")
        for kind in event_kinds((glob,)):
            found.setdefault(kind, share)
    for kind in sorted(found, key=lambda each: each.WIRE_NAME):
        if kind in UNSAMPLED and found[kind] < 1:
            raise ValueError(
                f"{kind.WIRE_NAME.removeprefix('event.')} cannot be sampled: who keeps copies of values needs each one"
            )
    return {kind: share for kind, share in found.items() if share < 1}


EVERYTHING = EventPolicy()
"""Plain keys, and every event."""
